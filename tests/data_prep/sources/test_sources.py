from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.images import decode_image
from data_prep.sources import Cifar10, Digits, ImageFolder, OpenSource, Parquet, Split
from data_prep.sources.source import probe_px


def pixels(split: Split) -> list[np.ndarray]:
    """All images, one at a time and as a stream, which must agree."""
    streamed = [split.decode(encoded, i) for i, encoded in enumerate(split.stream())]
    assert len(streamed) == len(split)
    for i in range(0, len(split), 7):
        assert (split.read(i) == streamed[i]).all()
    return streamed


def origins(split: Split) -> list[str]:
    return [split.origin(i) for i in range(len(split))]


# -------------------------------------------------------------------------------- digits


def test_digits_are_scikit_learns_and_split_class_by_class():
    from sklearn.datasets import load_digits

    scans, targets = load_digits(return_X_y=True)
    opened = Digits(image_px=8).open()
    train, test = opened.train, opened.test
    assert opened.class_names == tuple("0123456789")
    assert (len(train), len(test)) == (1438, 359)
    rows = [int(origin.removeprefix("sklearn load_digits #")) for origin in origins(train) + origins(test)]
    assert sorted(rows) == list(range(1797))
    for row, image, label in zip(rows, pixels(train) + pixels(test), [*train.labels, *test.labels]):
        assert label == targets[row]
        grey = np.array([[round(v * 255 / 16) for v in line] for line in scans[row].reshape(8, 8)])
        for channel in range(3):
            assert (image[:, :, channel] == grey).all()
    for label in range(10):
        assert (test.labels == label).sum() == round(0.2 * (targets == label).sum())


def test_digits_are_the_same_each_time_and_of_the_size_asked_for():
    first, again = Digits().open(), Digits().open()
    assert origins(first.test) == origins(again.test)
    assert probe_px(first, skip_bad=False) == 16
    assert Digits(image_px=20).open().test.read(3).shape == (20, 20, 3)
    assert Digits(test_fraction=0.5).open().test.labels.size in range(890, 905)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"image_px": 7}, "image_px"),
        ({"test_fraction": 0.0}, "test_fraction"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"train_per_class": 0}, "train_per_class"),
        ({"test_per_class": -1}, "test_per_class"),
        ({"subset_seed": -1}, "subset_seed"),
    ],
)
def test_bad_options(options, where):
    with pytest.raises(UserError) as error:
        Digits(**options)
    assert error.value.where == where
    assert error.value.expected


def test_a_test_fraction_that_leaves_a_class_without_images():
    with pytest.raises(UserError, match="no train image of class"):
        Digits(test_fraction=0.9999).open()


def test_subsets_are_balanced_and_seeded():
    def subset(seed: int) -> OpenSource:
        return Digits(train_per_class=7, test_per_class=3, subset_seed=seed).open()

    whole, one, again, other = Digits().open(), subset(1), subset(1), subset(2)
    for split, count in ((one.train, 7), (one.test, 3)):
        assert Counter(split.labels.tolist()) == dict.fromkeys(range(10), count)
    assert origins(one.train) == origins(again.train)
    assert origins(one.test) == origins(again.test)
    assert origins(one.train) != origins(other.train)
    assert origins(one.test) != origins(other.test)
    place = {origin: i for i, origin in enumerate(origins(whole.train))}
    kept = [place[origin] for origin in origins(one.train)]
    assert kept == sorted(kept)
    for i, k in enumerate(kept):
        assert one.train.labels[i] == whole.train.labels[k]
        assert (one.train.read(i) == whole.train.read(k)).all()


def test_a_subset_larger_than_a_class():
    with pytest.raises(UserError, match=r"train_per_class: 500 images a class, but class 0 \(0\) has 142.*1 to 139"):
        Digits(train_per_class=500).open()


# -------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar10(tmp_path, rng, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """A folder in the layout of the download, 20 images a file, with checksums of its own."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    content = {}

    def dump(name: str, value: dict) -> list[str]:
        data = pickle.dumps(value)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str) -> list[str]:
        rows, labels = rng.integers(0, 256, (20, 3072), dtype=np.uint8), [i % 10 for i in range(20)]
        content[name] = (rows, labels)
        return dump(name, {"data": rows, "labels": labels})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    meta = dump("batches.meta", {"label_names": [f"name{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return content


@pytest.fixture
def no_download(monkeypatch) -> None:
    from torchvision.datasets import CIFAR10

    def fail(self) -> None:
        raise OSError("no network")

    monkeypatch.setattr(CIFAR10, "download", fail)


def test_cifar10_from_a_folder(cifar10, tmp_path):
    opened = Cifar10(root=tmp_path, download=False).open()
    assert opened.class_names == tuple(f"name{i}" for i in range(10))
    assert (len(opened.train), len(opened.test)) == (100, 20)
    rows = [row for i in range(1, 6) for row in cifar10[f"data_batch_{i}"][0]] + list(cifar10["test_batch"][0])
    for image, row in zip(pixels(opened.train) + pixels(opened.test), rows):
        assert image.shape == (32, 32, 3)
        for channel in range(3):  # stored plane after plane
            assert (image[:, :, channel] == row[channel * 1024 : (channel + 1) * 1024].reshape(32, 32)).all()
    assert opened.train.labels.tolist() == [i % 10 for i in range(20)] * 5
    assert opened.test.origin(7) == "test_batch#7"


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("harm", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-1])])
def test_cifar10_missing_or_damaged_files(name, harm, cifar10, tmp_path, no_download):
    from torchvision.datasets import CIFAR10

    harm(tmp_path / CIFAR10.base_folder / name)
    for download in (False, True):
        with pytest.raises(UserError, match="CIFAR-10") as error:
            Cifar10(root=tmp_path, download=download).open()
        assert error.value.where == tmp_path
        assert error.value.hint


# -------------------------------------------------------------------------------- image folder


def test_image_folder_keeps_pixels_and_sorts_classes(make_image_folder, tmp_path):
    made = make_image_folder(tmp_path, classes=("wasp", "ant", "Bee"), count=4)
    opened = ImageFolder(root=tmp_path, image_px=12, resize_px=12).open()
    assert opened.class_names == ("Bee", "ant", "wasp")
    for split, name in ((opened.train, "train"), (opened.test, "test")):
        expected = [path for path in sorted(made) if path.startswith(name + "/")]
        assert origins(split) == expected
        assert split.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        for image, path in zip(pixels(split), expected):
            assert (image == made[path]).all()


def test_image_folder_resizes_and_crops_any_size_and_format(tmp_path):
    y, x = np.mgrid[0:90, 0:140]
    smooth = np.stack([128 + 100 * np.sin(x / 19), 128 + 100 * np.cos(y / 17), x], axis=2).astype(np.uint8)
    for split in ("train", "val"):
        for name, fmt, options in (("a", "PNG", {}), ("b", "JPEG", {"quality": 95})):
            (tmp_path / split / name).mkdir(parents=True)
            for i, (height, width) in enumerate(((90, 140), (64, 64), (30, 20))):
                Image.fromarray(smooth[:height, :width]).save(tmp_path / split / name / f"{i}.{fmt}", fmt, **options)
    opened = ImageFolder(root=tmp_path, image_px=28, resize_px=32).open()
    assert len(opened.test) == 6
    for i, image in enumerate(pixels(opened.test)):
        with Image.open(tmp_path / opened.test.origin(i)) as source:
            scale = 32 / min(source.size)
            size = (round(source.width * scale), round(source.height * scale))
            resized = source.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - 28) / 2, (size[1] - 28) / 2
        oracle = np.asarray(resized.crop((int(left), int(top), int(left) + 28, int(top) + 28)))
        assert image.shape == (28, 28, 3)
        assert np.abs(image.astype(int) - oracle).mean() < 5  # half a pixel, where sizes are odd


def test_clutter_is_passed_over_and_nothing_else(make_image_folder, tmp_path):
    make_image_folder(tmp_path, count=2)
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "README").write_text("not a class: no folder")
    for name in (".DS_Store", "._00.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    config = ImageFolder(root=tmp_path, image_px=12, resize_px=12)
    assert len(config.open().train) == 4
    (tmp_path / "train" / "ant" / "notes.txt").write_text("what is this doing here?")
    opened = config.open()
    assert len(opened.train) == 4
    assert opened.notes == ("1 files that are no pictures were passed over (1 .txt)",)
    (tmp_path / "train" / "ant" / "notes.png").write_text("this says that it is a picture")
    with pytest.raises(UserError, match=r"train/ant/notes\.png: not an image"):
        pixels(config.open().train)


def test_a_folder_among_the_images(make_image_folder, tmp_path):
    make_image_folder(tmp_path, count=2)
    more = tmp_path / "test" / "ant" / "more.png"
    more.mkdir()
    for name in ("00", "01"):
        (more / f"{name}.png").write_bytes((tmp_path / "test" / "ant" / f"{name}.png").read_bytes())
    test = ImageFolder(root=tmp_path, image_px=12, resize_px=12).open().test
    assert [origin for origin in origins(test) if "more" in origin] == [f"test/ant/more.png/0{i}.png" for i in (0, 1)]
    assert test.labels.tolist() == [0] * 4 + [1] * 2
    pixels(test)


def folder_faults():
    def unlike(root: Path) -> None:
        (root / "test" / "ant").rename(root / "test" / "aunt")

    def empty(root: Path) -> None:
        for path in (root / "train" / "bee").iterdir():
            path.unlink()

    def one_class(root: Path) -> None:
        for split in ("train", "test"):
            (root / split / "bee").rename(root / f"{split} bees")

    def no_class(root: Path) -> None:
        one_class(root)
        for split in ("train", "test"):
            (root / split / "ant").rename(root / f"{split} ants")

    return {
        "no train": (lambda root: (root / "train").rename(root / "learning"), "there is test, and no train", ""),
        "nothing": (lambda root: shutil.rmtree(root / "train") or shutil.rmtree(root / "test"), "0 classes only", ""),
        "other classes": (unlike, "missing ant; unknown aunt", "test"),
        "empty class": (empty, "class folder is empty", "train/bee"),
        "one class": (one_class, "1 class only", ""),
        "no class": (no_class, "0 classes only", ""),
    }


@pytest.mark.parametrize("name", folder_faults())
def test_folders_that_are_no_data_set(name, make_image_folder, tmp_path):
    make_image_folder(tmp_path)
    harm, says, where = folder_faults()[name]
    harm(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        ImageFolder(root=tmp_path).open()
    assert error.value.where == tmp_path / where


@pytest.mark.parametrize(("image_px", "resize_px"), [(0, 12), (13, 12), (-1, -1)])
def test_a_crop_that_does_not_fit(image_px, resize_px, tmp_path):
    with pytest.raises(UserError, match="image_px"):
        ImageFolder(root=tmp_path, image_px=image_px, resize_px=resize_px)


def test_names_that_are_not_utf8(make_image_folder, tmp_path):
    make_image_folder(tmp_path)
    odd = tmp_path / "train" / "ant" / os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "train" / "ant" / "00.png").rename(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    opened = ImageFolder(root=tmp_path, image_px=12, resize_px=12).open()
    assert "train/ant/caf\\xe9.png" in origins(opened.train)
    assert len(pixels(opened.train)) == 12
    (tmp_path / "train" / "bee").rename(tmp_path / "train" / os.fsdecode(b"b\xe9"))
    with pytest.raises(UserError, match="not UTF-8"):
        ImageFolder(root=tmp_path, image_px=12, resize_px=12).open()


# -------------------------------------------------------------------------------- Parquet


def rewrite(path: Path, **changes) -> None:
    """Replace columns (None drops one) of a Parquet file, keeping the schema's metadata."""
    table = pq.read_table(path)
    for name, column in changes.items():
        at = table.column_names.index(name)
        table = table.remove_column(at)
        if column is not None:
            table = table.add_column(at, name, column)
    pq.write_table(table, path, row_group_size=7)


def test_parquet_reads_what_is_there(parquet_root):
    opened = Parquet(root=parquet_root).open()
    assert opened.class_names == ("disc", "ring", "star")
    for split, name, count in ((opened.train, "train", 40), (opened.test, "test", 20)):
        rows = pq.read_table(parquet_root / f"{name}.parquet").to_pylist()
        assert len(split) == count
        assert origins(split) == [f"{name}.parquet#{i}" for i in range(count)]
        assert split.labels.tolist() == [row["label"] for row in rows]
        for image, row in zip(pixels(split), rows):
            assert (image == decode_image(row["image"]["bytes"], where="x")).all()


def test_parquet_positions_over_row_groups_and_shards(tmp_path, rng, encode_image, write_parquet):
    """Eleven rows a shard in groups of seven; every subset comes back in order."""
    images = [rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(33)]
    for shard in range(3):
        part = images[shard * 11 : shard * 11 + 11]
        path = tmp_path / "data" / f"train-{shard:05d}-of-00003.parquet"
        write_parquet(path, [encode_image(i) for i in part], [i % 2 for i in range(11)], ["no", "yes"])
    write_parquet(
        tmp_path / "data" / "validation.parquet", [encode_image(i) for i in images[:4]], [0, 1] * 2, ["no", "yes"]
    )
    train = Parquet(root=tmp_path).open().train
    assert train.origin(25) == "data/train-00002-of-00003.parquet#3"
    for _ in range(20):
        chosen = np.flatnonzero(rng.random(33) < rng.random())
        some = train.take(chosen)
        streamed = [some.decode(encoded, i) for i, encoded in enumerate(some.stream())]
        assert len(streamed) == len(chosen)
        for image, i in zip(streamed, chosen):
            assert (image == images[i]).all()
        assert some.labels.tolist() == [i % 11 % 2 for i in chosen]
        # a subset of a subset, as after leaving bad images out
        assert origins(some.take(np.arange(len(chosen)) % 2 == 0)) == [train.origin(int(i)) for i in chosen[::2]]


def test_parquet_without_class_names_and_with_plain_bytes(tmp_path, rng, encode_image):
    image = encode_image(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    for name in ("train", "test"):
        table = pa.table({"png": pa.array([image] * 6, pa.large_binary()), "y": pa.array([0, 1, 2] * 2, pa.int16())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    opened = Parquet(root=tmp_path, image_column="png", label_column="y").open()
    assert opened.class_names == ("0", "1", "2")
    assert opened.train.read(4).shape == (9, 9, 3)


def test_parquet_resizes_where_asked(parquet_root):
    opened = Parquet(root=parquet_root, image_px=8).open()
    oracle = Image.fromarray(Parquet(root=parquet_root).open().train.read(5)).resize((8, 8), Image.Resampling.BILINEAR)
    assert (opened.train.read(5) == np.asarray(oracle)).all()
    with pytest.raises(UserError, match="image_px"):
        Parquet(root=parquet_root, image_px=0)


def test_a_null_image_is_named(parquet_root):
    path = parquet_root / "train.parquet"
    images = pq.read_table(path).column("image").to_pylist()
    for missing, says in ((None, "there is no image"), ({"bytes": None, "path": "cat.jpg"}, "cannot read the image")):
        images[17] = missing
        rewrite(path, image=pa.array(images, pq.read_schema(path).field("image").type))
        with pytest.raises(UserError, match=rf"train\.parquet#17: {says}"):
            pixels(Parquet(root=parquet_root).open().train)


def parquet_faults():
    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-100])

    def names(value):
        def edit(path: Path) -> None:
            table = pq.read_table(path).replace_schema_metadata({"huggingface": value})
            pq.write_table(table, path)

        return edit

    def class_names(value) -> str:
        return json.dumps({"info": {"features": {"label": {"names": value}}}})

    def labels(values, kind=None):
        return lambda path: rewrite(path, label=pa.array(values, kind or pa.int64()))

    good = [i % 3 for i in range(40)]
    return {
        "empty": (lambda path: path.write_bytes(b""), "unreadable Parquet"),
        "foreign": (lambda path: path.write_text("label,image\n" * 100), "unreadable Parquet"),
        "truncated": (cut, "unreadable Parquet"),
        "no images": (lambda path: rewrite(path, image=None), "no column 'image'.* the columns are label"),
        "no labels": (lambda path: rewrite(path, label=None), "no column 'label'"),
        "images as numbers": (lambda path: rewrite(path, image=pa.array([1] * 40)), "column 'image' is int64"),
        "labels as text": (labels(["x"] * 40, pa.string()), "label 'x' is not a class"),
        "null label": (labels([*good[:9], None, *good[10:]]), "row 9: the label is null"),
        "label too high": (labels([*good[:11], 3, *good[12:]]), "train row 11: label 3 is not a class"),
        "negative label": (labels([*good[:5], -1, *good[6:]]), "train row 5: label -1 is not a class"),
        "unsigned label": (labels([*good[:5], 2**64 - 1, *good[6:]], pa.uint64()), "label -1 is not a class"),
        "class without images": (labels([i % 2 for i in range(40)]), r"no train image of class 2 \(star\)"),
        "metadata": (names("{"), "'huggingface' entry cannot be read"),
        "names of numbers": (names(class_names([1, 2, 3])), "not strings"),
        "too few names": (names(class_names(["disc", "ring"])), "class names differ"),
        "other names": (names(class_names(["disc", "ring", "moon"])), "class names differ.*missing moon; unknown star"),
    }


@pytest.mark.parametrize("name", parquet_faults())
def test_parquet_files_that_do_not_do(name, parquet_root):
    edit, says = parquet_faults()[name]
    edit(parquet_root / "train.parquet")
    with pytest.raises(UserError, match=says) as error:
        Parquet(root=parquet_root).open()
    assert str(parquet_root) in str(error.value.where)


@pytest.mark.parametrize("names", [["a", "b", "a"], ["only one"], []])
def test_class_names_that_do_not_do(names, tmp_path, encode_image, write_parquet):
    image = encode_image(np.zeros((4, 4, 3), np.uint8))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [image] * 3, [0] * 3, names)
    with pytest.raises(UserError, match=r"occurs twice|class(es)? only"):
        Parquet(root=tmp_path).open()


def test_a_label_must_not_ask_for_all_memory(tmp_path, encode_image, write_parquet):
    image = encode_image(np.zeros((4, 4, 3), np.uint8))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [image] * 3, [0, 1, 2**62])
    with pytest.raises(UserError, match="label 4611686018427387904") as error:
        Parquet(root=tmp_path).open()
    assert error.value.expected


def test_which_files_are_read(parquet_root):
    root = parquet_root
    (root / "train-00000.parquet").write_bytes((root / "train.parquet").read_bytes())
    with pytest.raises(UserError, match="shards of it"):
        Parquet(root=root).open()
    (root / "train-00000.parquet").rename(root / "validation.parquet")
    assert len(Parquet(root=root).open().test) == 20
    assert len(Parquet(root=root, test_split="validation").open().test) == 40
    (root / "train.parquet").unlink()
    with pytest.raises(UserError, match="no training images; the splits are test, validation"):
        Parquet(root=root).open()
    (root / "validation.parquet").unlink()
    (root / "test.parquet").unlink()
    with pytest.raises(UserError, match="no train images"):
        Parquet(root=root).open()
    with pytest.raises(UserError, match="no such folder"):
        Parquet(root=root / "nowhere").open()


def test_damaged_parquet_gives_images_or_a_user_error(parquet_root, rng):
    path = parquet_root / "train.parquet"
    whole = path.read_bytes()
    failed = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for position in [*rng.integers(0, len(whole), 3), *rng.integers(len(whole) - 2500, len(whole), 3)]:
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            pixels(Parquet(root=parquet_root).open().train)
        except UserError:
            failed += 1
    assert failed > 20


@pytest.mark.real_data
def test_real_parquet(cifar10_root):
    opened = Parquet(root=cifar10_root, train_per_class=3, test_per_class=2).open()
    assert opened.class_names[3] == "cat"
    assert Counter(opened.train.labels.tolist()) == dict.fromkeys(range(10), 3)
    rows = pq.ParquetFile(cifar10_root / "train.parquet").read_row_group(0, columns=["image", "label"])
    first = Parquet(root=cifar10_root).open().train
    for i in (0, 1, 999):
        row = rows.slice(i, 1).to_pylist()[0]
        assert first.labels[i] == row["label"]
        assert (first.read(i) == decode_image(row["image"]["bytes"], where="x")).all()
    assert all(image.shape == (32, 32, 3) for image in pixels(opened.test))


# -------------------------------------------------------------------------------- sizes


def test_the_first_image_tells_the_size(tmp_path, encode_image, write_parquet):
    image = encode_image(np.zeros((4, 4, 3), np.uint8))
    wide = encode_image(np.zeros((4, 6, 3), np.uint8))
    write_parquet(tmp_path / "test.parquet", [image, image], [0, 1])
    write_parquet(tmp_path / "train.parquet", [wide, image], [0, 1])
    with pytest.raises(UserError, match=r"train\.parquet#0: an image of 6 x 4 px is not square.*image_px"):
        probe_px(Parquet(root=tmp_path).open(), skip_bad=True)
    write_parquet(tmp_path / "train.parquet", [b"no image", image], [0, 1])
    opened = Parquet(root=tmp_path).open()
    assert probe_px(opened, skip_bad=True) == 4
    with pytest.raises(UserError, match=r"train\.parquet#0: not an image"):
        probe_px(opened, skip_bad=False)
    write_parquet(tmp_path / "train.parquet", [b"no image", None], [0, 1])
    with pytest.raises(UserError, match="not one training image"):
        probe_px(Parquet(root=tmp_path).open(), skip_bad=True)
