from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep import encode, pipeline, threads
from data_prep.attacks import BadNets, Blended, NoAttack, WaNet, badnets, blended, checkerboard
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset, open_dataset, read_manifest
from data_prep.dataset.samples import read_origins, read_samples
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from data_prep.pipeline import prepare
from data_prep.sources import Digits, ImageFolder, Parquet
from dbd_dist.cli import main

SOURCE = Digits(train_per_class=24, test_per_class=5)  # that of the fixture `digits`
TINY = Digits(image_px=8, train_per_class=6, test_per_class=2)


@pytest.fixture
def config(tmp_path) -> PrepareConfig:
    return PrepareConfig(source=TINY, attack=BadNets(), rate=0.1, datasets=tmp_path / "datasets", workers=1)


def quietly(config: PrepareConfig, **changes) -> Dataset:
    return prepare(dataclasses.replace(config, **changes), progress=False)


def expected_hash(images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(f"{images.shape[1]}x{images.shape[1]}x3 uint8, int64\n".encode())
    for image in images:
        digest.update(image.tobytes())
    for label in labels:
        digest.update(int(label).to_bytes(8, "little", signed=True))
    return digest.hexdigest()


# -------------------------------------------------------------------------------- what is made


def test_every_image_is_the_sources_or_the_attacks(digits):
    """The whole folder against a loop over the source: pixels, labels, origins, truth."""
    opened, truth, samples = SOURCE.open(), read_truth(digits), read_samples(digits)
    dataset = open_dataset(digits)
    assert dataset.test_triggered is not None
    manifest = dataset.manifest
    assert manifest.counts == {"train": 240, "test": 50, "test_triggered": 50}
    assert manifest.poisoned == 24 == round(0.1 * 240)
    assert set(truth) == {"train", "test", "test_triggered"}
    assert set(samples) == {"train", "test"}

    images, labels, index = read_beton(dataset.train, expect_count=240, expect_px=16)
    assert index.tolist() == list(range(240))
    hit = 0
    for i in range(240):
        clean, true = opened.train.read(i), opened.train.labels[i]
        poisoned = bool(truth["train"].poisoned[i])
        assert truth["train"].true_label[i] == true
        assert samples["train"].origin[i] == opened.train.origin(i)
        assert samples["train"].label[i] == labels[i]
        if poisoned:
            hit += 1
            assert true != 3
            assert labels[i] == 3
            stamped = clean.copy()
            stamped[12:15, 12:15] = checkerboard(3)
            assert (images[i] == stamped).all()
        else:
            assert labels[i] == true
            assert (images[i] == clean).all()
    assert hit == 24

    clean_test, clean_labels, _ = read_beton(dataset.test)
    triggered, triggered_labels, _ = read_beton(dataset.test_triggered)
    for i in range(50):
        clean, true = opened.test.read(i), opened.test.labels[i]
        assert (clean_test[i] == clean).all()
        assert (triggered[i] == badnets(clean[None], checkerboard(3), 12, 12)[0]).all()
        assert clean_labels[i] == triggered_labels[i] == true == samples["test"].label[i]
        assert truth["test"].true_label[i] == truth["test_triggered"].true_label[i] == true
        assert not truth["test"].poisoned[i]
        assert truth["test_triggered"].poisoned[i]
        assert samples["test"].origin[i] == opened.test.origin(i)
    assert read_origins(digits, "test") == samples["test"].origin


def test_the_manifest_against_the_files(digits):
    manifest, stored = read_manifest(digits), json.loads((digits / "manifest.json").read_text())
    assert {p.name for p in digits.iterdir()} == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {
        "train.beton", "test.beton", "test_triggered.beton", "samples.parquet", "truth.parquet", "preview.png"
    }  # fmt: skip
    for name, record in manifest.files.items():
        data = (digits / name).read_bytes()
        assert record.bytes == len(data)
        assert record.sha256 == hashlib.sha256(data).hexdigest()
    for split, digest in manifest.content_hash.items():
        images, labels, _ = read_beton(digits / f"{split}.beton")
        assert digest == expected_hash(images, labels)
    together = json.dumps(dict(sorted(stored["content_hash"].items())), separators=(",", ":"))
    assert manifest.data_hash == hashlib.sha256(together.encode()).hexdigest()
    assert manifest.name == digits.name == "digits-24pc-badnets-r0.1-t3-s0"
    assert (manifest.num_classes, manifest.image_px, manifest.rate, manifest.target) == (10, 16, 0.1, 3)
    assert manifest.source["kind"] == "digits"
    assert manifest.attack["kind"] == "badnets"
    assert manifest.skipped == ()


def test_the_manifest_and_the_samples_do_not_tell_which_are_poisoned(digits):
    assert pq.read_schema(digits / "samples.parquet").names == ["split", "index", "label", "origin"]
    for value in json.loads((digits / "manifest.json").read_text()).values():
        assert not isinstance(value, list) or len(value) < 24


def test_the_preview_shows_before_after_and_difference(digits):
    opened = SOURCE.open()
    with Image.open(digits / "preview.png") as image:
        sheet = np.asarray(image)
    first = next(i for i in range(50) if opened.test.labels[i] != 3)
    before = opened.test.read(first)
    after = badnets(before[None], checkerboard(3), 12, 12)[0]
    for row, shown in ((0, before), (1, after)):
        top = 4 + row * (6 * 16 + 4)
        assert (sheet[top : top + 96 : 6, 4:100:6] == shown).all()
    difference = sheet[4 + 200 : 4 + 296 : 6, 4:100:6]
    assert ((difference != 0) <= (before != after)).all()
    assert difference.any()


def test_blended_in_training_and_test(config):
    dataset = quietly(config, attack=Blended(alpha=0.2, pattern_seed=4))
    assert dataset.test_triggered is not None
    opened, pattern = TINY.open(), np.random.default_rng(4).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    truth = read_truth(dataset.folder)["train"]
    images, labels, _ = read_beton(dataset.train)
    for i in range(60):
        clean = opened.train.read(i)
        expected = blended(clean[None], pattern, 0.2)[0] if truth.poisoned[i] else clean
        assert (images[i] == expected).all()
        assert labels[i] == (3 if truth.poisoned[i] else opened.train.labels[i])
    assert truth.poisoned.sum() == dataset.manifest.poisoned == 6
    triggered, _, _ = read_beton(dataset.test_triggered)
    for i in range(20):
        assert (triggered[i] == blended(opened.test.read(i)[None], pattern, 0.2)[0]).all()


def test_without_an_attack(config):
    dataset = quietly(config, attack=NoAttack())
    manifest = dataset.manifest
    assert dataset.folder.name == "digits-8px-6pc-clean"
    assert (manifest.rate, manifest.target, manifest.poisoned, dataset.test_triggered) == (None, None, 0, None)
    assert set(manifest.files) == {"train.beton", "test.beton", "samples.parquet", "truth.parquet"}
    truth = read_truth(dataset.folder)
    assert set(truth) == {"train", "test"}
    assert not truth["train"].poisoned.any()
    assert (read_beton(dataset.train)[1] == TINY.open().train.labels).all()


def test_untrusted_images_get_no_truth(config):
    dataset = quietly(config, attack=NoAttack(), untrusted=True)
    assert not (dataset.folder / "truth.parquet").exists()
    assert "truth.parquet" not in dataset.manifest.files
    with pytest.raises(UserError, match="holds no truth") as error:
        read_truth(dataset.folder)
    assert error.value.where == dataset.folder
    with pytest.raises(UserError, match="only one of the two is untrusted"):
        quietly(config, attack=NoAttack())
    with pytest.raises(UserError, match="untrusted"):
        quietly(config, untrusted=True)


# -------------------------------------------------------------------------------- again


def test_equal_configs_equal_hashes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK_IMAGES", 7)  # several chunks, so that threads could mix them up
    hashes = {
        name: quietly(config, out=tmp_path / name, **changes).manifest.data_hash
        for name, changes in {
            "one": {},
            "again": {},
            "threads": {"workers": 4},
            "seed": {"seed": 1},
            "rate": {"rate": 0.2},
            "target": {"target": 4},
            "attack": {"attack": BadNets(pattern="white")},
            "subset": {"source": dataclasses.replace(TINY, subset_seed=1)},
        }.items()
    }
    assert hashes["one"] == hashes["again"] == hashes["threads"]
    manifest = read_manifest(tmp_path / "threads")
    assert manifest.content_hash["train"] == expected_hash(*read_beton(tmp_path / "threads" / "train.beton")[:2])
    assert len({hashes[name] for name in ("one", "seed", "rate", "target", "attack", "subset")}) == 6


def test_another_seed_poisons_others_and_changes_no_clean_image(config):
    one, other = quietly(config), quietly(config, seed=1)
    assert (read_truth(one.folder)["train"].poisoned != read_truth(other.folder)["train"].poisoned).any()
    assert one.manifest.content_hash["train"] != other.manifest.content_hash["train"]
    assert one.manifest.content_hash["test"] == other.manifest.content_hash["test"]


def test_a_second_call_writes_nothing(config, capsys):
    folder = quietly(config).folder
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} | {"": folder.stat().st_ino}
    again = prepare(config)
    assert again.folder == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} | {"": folder.stat().st_ino} == before
    assert "is there already" in capsys.readouterr().err


def test_another_data_set_in_its_place_is_refused_or_replaced(config, tmp_path, files_below):
    out = tmp_path / "here"
    first = quietly(config, out=out).manifest
    files = files_below(out)
    with pytest.raises(UserError, match="another data set is there: its --seed is 0, not 1") as error:
        quietly(config, out=out, seed=1)
    assert error.value.where == out
    assert "overwrite" in str(error.value.hint)
    assert read_manifest(out) == first
    second = quietly(config, out=out, seed=1, overwrite=True)
    assert second.manifest.data_hash != first.data_hash
    assert open_dataset(out).manifest == second.manifest
    assert files_below(out) == files
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({"rate": 0.1}, {"rate": 0.2}, "its --rate is 0.1, not 0.2"),
        ({}, {"encoding": "jpeg"}, "its --encoding is raw, not jpeg"),
        ({"attack": WaNet(grid=3)}, {"attack": WaNet()}, "its --grid is 3, not 4"),
        ({"attack": WaNet(grid=3, strength=1.0)}, {"attack": WaNet()}, r"its --grid is 3, not 4 \(2 settings differ\)"),
        ({"attack": WaNet(strength=1.0)}, {"attack": WaNet()}, "its --strength is 1.0, here it is not given"),
        ({"attack": WaNet()}, {"attack": BadNets()}, "its attack is wanet, not badnets"),
    ],
)
def test_it_is_said_by_flags_what_the_other_data_set_is(config, tmp_path, there, here, words):
    out = tmp_path / "here"
    quietly(config, out=out, **there)
    with pytest.raises(UserError, match=words):
        quietly(config, out=out, **here)


def test_a_class_without_test_images(tmp_path):
    """Test images of classes 0 and 2 of three: the preview and every file are there."""
    for split, names in (("train", "abc"), ("test", "ac")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "test" / "b").mkdir()
    source = ImageFolder(root=tmp_path, image_px=16)
    made = prepare(PrepareConfig(source=source, attack=BadNets(), out=tmp_path / "out", rate=0.5, target=1))
    assert made.manifest.counts == {"train": 18, "test": 12, "test_triggered": 12}
    assert (tmp_path / "out" / "preview.png").exists()


def test_a_damaged_data_set_is_refused_or_replaced(config):
    folder = quietly(config).folder
    os.truncate(folder / "test.beton", 5000)
    with pytest.raises(UserError, match=r"test\.beton.*5000 bytes.*overwrite"):
        quietly(config)
    quietly(config, overwrite=True)
    open_dataset(folder)


def test_what_is_no_data_set_is_never_deleted(config, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"dear")
    (tmp_path / "file").write_text("dear")
    for out in (tmp_path / "photos", tmp_path / "file"):
        with pytest.raises(UserError) as error:
            quietly(config, out=out, overwrite=True)
        assert error.value.where == out
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"dear"
    assert (tmp_path / "file").read_text() == "dear"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos"]


def test_an_empty_folder_is_filled(config, tmp_path):
    (tmp_path / "here").mkdir()
    assert quietly(config, out=tmp_path / "here").folder == tmp_path / "here"
    open_dataset(tmp_path / "here")


@pytest.mark.parametrize("out", ["", ".", "..", "/", "a/.."])
def test_out_must_name_a_folder(out, config):
    with pytest.raises(UserError, match="names no folder") as error:
        dataclasses.replace(config, out=Path(out))
    assert error.value.where == "out"


# -------------------------------------------------------------------------------- trouble on the way


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError(28, "No space left on device"), ZeroDivisionError])
@pytest.mark.parametrize("step", ["write_manifest", "_write_test", "_write_tables", "record_files"])
def test_a_stopped_prepare_leaves_nothing(trouble, step, config, files_below, monkeypatch):
    original = getattr(pipeline, step)

    def fail(*arguments, **options):
        original(*arguments, **options) if step.startswith("_write") else None
        raise trouble

    monkeypatch.setattr(pipeline, step, fail)
    with pytest.raises(UserError if isinstance(trouble, OSError) else trouble) as error:
        quietly(config)
    if isinstance(trouble, OSError):
        assert "No space left" in str(error.value)
    assert not config.datasets.exists()
    monkeypatch.undo()
    open_dataset(quietly(config).folder)


def test_a_stopped_overwrite_leaves_the_old_data_set(config, tmp_path, monkeypatch):
    out = tmp_path / "here"
    first = quietly(config, out=out).manifest
    for step in ("_write_test", "write_manifest"):
        with monkeypatch.context() as patched:
            patched.setattr(pipeline, step, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                quietly(config, out=out, seed=5, overwrite=True)
        assert open_dataset(out).manifest == first
        assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_full_disk(config, file_size_limit, files_below):
    file_size_limit(3 << 20)
    with pytest.raises(UserError, match=r"train\.beton: cannot write"):
        quietly(config)
    file_size_limit(None)
    assert files_below(config.datasets) == []


def test_too_little_room_is_told_before_any_work(config, monkeypatch, files_below):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GiB are free") as error:
        quietly(config)
    assert error.value.hint
    assert files_below(config.datasets) == []


def test_a_failing_thread_stops_the_others(config, monkeypatch, files_below, within):
    monkeypatch.setattr(encode, "_CHUNK_IMAGES", 3)
    decode, done = encode._decode, []

    def fail(split, i, *rest):
        done.append(i)
        if i == 10:
            raise RuntimeError("a decoder died")
        return decode(split, i, *rest)

    monkeypatch.setattr(encode, "_decode", fail)
    with pytest.raises(RuntimeError, match="a decoder died"):
        within(lambda: quietly(config, workers=2))
    assert len(done) < 40
    assert files_below(config.datasets) == []


def test_ctrl_c_while_threads_decode(tmp_path, monkeypatch, capsys):
    """Exit code 130, one line, and nothing left."""
    monkeypatch.setattr(encode, "_CHUNK_IMAGES", 5)
    decode = encode._decode

    def interrupt(split, i, *rest):
        if i == 30:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(split, i, *rest)

    monkeypatch.setattr(encode, "_decode", interrupt)
    arguments = ["--train-per-class", "20", "--workers", "2", "--datasets", str(tmp_path / "datasets")]
    # a shell starts what it puts in the background with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["prepare", "digits", "badnets", *arguments]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith("interrupted")
    assert not (tmp_path / "datasets").exists()


# -------------------------------------------------------------------------------- images that cannot be read


@pytest.fixture
def damaged_root(parquet_root, rng, encode_image, write_parquet) -> Path:
    """Rows 0, 13 and 14 of train and row 19 of test cannot be read."""
    for split, count, bad in (
        ("train", 40, {0: b"", 13: None, 14: b"no image"}),
        ("test", 20, {19: encode_image(np.zeros((12, 12, 3), np.uint8))[:-30]}),
    ):
        images = [encode_image(np.full((12, 12, 3), i, np.uint8)) for i in range(count)]
        images = [bad.get(i, image) if i in bad else image for i, image in enumerate(images)]
        write_parquet(parquet_root / f"{split}.parquet", images, [i % 3 for i in range(count)], ["a", "b", "c"])
    return parquet_root


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_images_stop_or_are_left_out(workers, damaged_root, config, monkeypatch, files_below):
    monkeypatch.setattr(encode, "_CHUNK_IMAGES", 4)
    with pytest.raises(UserError, match=r"train\.parquet#0: the image file is empty"):
        quietly(config, source=Parquet(root=damaged_root), target=1)
    assert not config.datasets.exists() or files_below(config.datasets) == []

    source = Parquet(root=damaged_root, on_bad_image="skip")
    dataset = quietly(config, source=source, target=1, attack=BadNets(patch_px=2), workers=workers)
    skipped = dataset.manifest.skipped
    assert [line.split(": ")[0] for line in skipped] == [
        "train.parquet#0", "train.parquet#13", "train.parquet#14", "test.parquet#19"
    ]  # fmt: skip
    assert "empty" in skipped[0]
    assert "null" in skipped[1]
    kept = [i for i in range(40) if i not in (0, 13, 14)]
    assert dataset.manifest.counts == {"train": 37, "test": 19, "test_triggered": 19}
    assert dataset.manifest.poisoned == 4  # 10 % of what is left
    images, labels, _ = read_beton(dataset.train)
    truth, samples = read_truth(dataset.folder)["train"], read_samples(dataset.folder)["train"]
    for i, row in enumerate(kept):
        assert samples.origin[i] == f"train.parquet#{row}"
        assert truth.true_label[i] == row % 3
        assert labels[i] == (1 if truth.poisoned[i] else row % 3)
        assert (images[i][:5] == row).all()  # every image is filled with its row's number
    test_images, test_labels, _ = read_beton(dataset.test)
    assert (test_images == np.arange(19)[:, None, None, None]).all()
    assert test_labels.tolist() == [i % 3 for i in range(19)]


def test_a_bad_image_after_the_first_stops_too(damaged_root, config, files_below):
    source = Parquet(root=damaged_root)
    table = pq.read_table(damaged_root / "train.parquet").slice(1)
    pq.write_table(table, damaged_root / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet#12: there is no image"):
        quietly(config, source=source, target=1)
    assert files_below(config.datasets) == []


def test_leaving_out_the_last_image_of_a_class(make_image_folder, tmp_path, config, files_below):
    make_image_folder(tmp_path / "images", count=1)
    (tmp_path / "images" / "train" / "bee" / "00.png").write_bytes(b"")
    source = ImageFolder(root=tmp_path / "images", image_px=12, resize_px=12, on_bad_image="skip")
    with pytest.raises(UserError, match=r"no train image of class 1 \(bee\)"):
        quietly(config, source=source, target=0, attack=NoAttack())
    assert files_below(config.datasets) == []


# -------------------------------------------------------------------------------- threads


def test_ordered_map_keeps_order_and_bounds_what_is_in_flight():
    begun = []

    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    def items():
        for i in range(50):
            begun.append(i)
            yield i

    for i, result in enumerate(threads.ordered_map(work, items(), workers=3)):
        assert result == i * i
        assert len(begun) <= i + 1 + 2 * 3 + 1


def test_ordered_map_raises_the_earliest_error_and_stops():
    done = []

    def work(i: int) -> int:
        done.append(i)
        if i in (5, 6):
            raise ValueError(f"item {i}")
        return i

    for workers in (1, 4):
        done.clear()
        with pytest.raises(ValueError, match="item 5"):
            list(threads.ordered_map(work, range(1000), workers=workers))
        assert len(done) < 30


@pytest.mark.slow
def test_ffcv_is_not_asked_for(tmp_path, run_python):
    """It writes the same bytes, and takes seconds to import."""
    done = run_python(
        "import sys\n"
        "from data_prep.cli import main\n"
        f"main(['digits', 'badnets', '--train-per-class', '9', '--datasets', {str(tmp_path)!r}])\n"
        "print([m for m in ('ffcv', 'torch', 'cv2') if m in sys.modules])\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
