"""`dbd doctor FOLDER` looks at every sample, and believes no hash that a forger can write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.artefacts import write_artefact
from data_prep.attacks import AdapBlend, NoAttack, WaNet
from data_prep.beton import read_beton, write_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset, read_manifest, record_files
from data_prep.dataset.samples import read_samples, write_samples
from data_prep.dataset.truth import read_truth, write_truth
from data_prep.dataset.verify import verify_dataset
from data_prep.io.hashes import content_hash, data_hash, sha256_json
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.models.heads import Classifier
from dbd_dist.runtime.run_folder import RunFolder

CHECKS = ["manifest", "files", "tables", "labels", "images", "samples", "truth", "preview"]


def seal(folder: Path, **changes) -> None:
    """Write the manifest anew, as a forger would: sizes, file hashes and checksum fit whatever lies in the folder."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | changes
    del content["checksum"]
    content["files"] = {n: {"bytes": r.bytes, "sha256": r.sha256} for n, r in record_files(folder).items()}
    path.write_text(json.dumps(content | {"checksum": sha256_json(content)}))


Damaged = Callable[..., str]


@pytest.fixture
def damaged(capsys) -> Damaged:
    def run(*folders: Path) -> str:
        capsys.readouterr()
        assert main(["doctor", *map(str, folders)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


def test_a_whole_data_set_passes_every_check(digits, capsys):
    assert [passed.name for passed in verify_dataset(digits, progress=False)] == CHECKS
    assert main(["doctor", str(digits), str(digits)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown if line.startswith("  ok ")] == CHECKS * 2
    assert shown[-1] == "Whole."
    assert any("24 poisoned, 0 covers" in line for line in shown)


@pytest.mark.parametrize("attack", [NoAttack(), WaNet(), AdapBlend(mapping="all-to-all")])
def test_other_attacks_pass(attack, tmp_path):
    source = Digits(train_per_class=12, test_per_class=2)
    config = PrepareConfig(source=source, attack=attack, out=tmp_path / "x", rate=None, workers=1)
    assert len([*verify_dataset(prepare(config, progress=False).folder, progress=False)]) >= 7


def test_jpeg_in_the_files_passes_and_is_held_against_the_manifest(tmp_path, damaged):
    source = Digits(train_per_class=3, test_per_class=2)
    config = PrepareConfig(source=source, encoding="jpeg", out=tmp_path / "x", workers=1)
    folder = prepare(config, progress=False).folder
    assert len([*verify_dataset(folder, progress=False)]) == len(CHECKS) - 1
    seal(folder, encoding={"kind": "raw"}, encoding_psnr_db=None)
    assert "train.beton: images are JPEG, the manifest's encoding is raw" in damaged(folder)


def test_an_untrusted_one_passes(tmp_path):
    source = Digits(train_per_class=3, test_per_class=2)
    folder = prepare(PrepareConfig(source=source, untrusted=True, out=tmp_path / "x", workers=1), progress=False).folder
    details = {passed.name: passed.detail for passed in verify_dataset(folder, progress=False)}
    assert details["truth"] == "none: the images are untrusted"


def rewrite_beton(folder: Path, split: str, change: Callable[[np.ndarray, np.ndarray], None]) -> None:
    images, labels, _ = read_beton(folder / f"{split}.beton")
    labels = labels.copy()
    change(images, labels)
    write_beton(folder / f"{split}.beton", images, labels)


def test_every_pixel_and_label_counts(digits_copy, damaged):
    for split in ("train", "test", "test_triggered"):
        whole = (digits_copy / f"{split}.beton").read_bytes()

        def pixel(images, labels):
            images[7, 3, 4, 1] ^= 1

        rewrite_beton(digits_copy, split, pixel)
        message = damaged(digits_copy)
        assert f"{split}.beton: the file's sha256 is not that of the manifest" in message
        seal(digits_copy)
        open_dataset(digits_copy)  # a forged manifest deceives what only looks at hashes of files
        assert f"{split}.beton: the decoded images and labels are not those" in damaged(digits_copy)
        (digits_copy / f"{split}.beton").write_bytes(whole)
        seal(digits_copy)


def reseal_content(folder: Path) -> None:
    """A forger who decodes as well."""
    hashes = dict(read_manifest(folder).content_hash)
    for split in hashes:
        images, labels, _ = read_beton(folder / f"{split}.beton")
        hashes[split] = content_hash(images, labels)
    seal(folder, content_hash=hashes, data_hash=data_hash(hashes))


def test_labels_are_held_against_classes_samples_and_truth(digits_copy, damaged):
    whole = (digits_copy / "train.beton").read_bytes()

    def out_of_range(images, labels):
        labels[5] = 10

    rewrite_beton(digits_copy, "train", out_of_range)
    reseal_content(digits_copy)
    assert "train.beton, sample 5: label 10 is not a class, 0 to 9" in damaged(digits_copy)
    (digits_copy / "train.beton").write_bytes(whole)

    def another(images, labels):
        labels[6] = (labels[6] + 1) % 10

    rewrite_beton(digits_copy, "train", another)
    reseal_content(digits_copy)
    assert "samples.parquet, sample 6: train label" in damaged(digits_copy)
    samples = dict(read_samples(digits_copy))
    samples["train"].label[6] = (samples["train"].label[6] + 1) % 10
    write_samples(digits_copy, samples)
    seal(digits_copy)
    assert "train.beton, sample 6: label" in damaged(digits_copy)
    assert "by truth and attack" in damaged(digits_copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["train"].poisoned.__setitem__(int(np.flatnonzero(~t["train"].poisoned)[0]), True), "25 poisoned"),
        (lambda t: t["train"].cover.__setitem__(int(np.flatnonzero(~t["train"].poisoned)[0]), True), "1 covers"),
        (lambda t: t["train"].cover.__setitem__(int(np.flatnonzero(t["train"].poisoned)[0]), True), "both poisoned"),
        (lambda t: t["train"].true_label.__setitem__(3, 12), "sample 3: label 12 is not a class"),
        (lambda t: t["test"].true_label.__setitem__(2, (t["test"].true_label[2] + 1) % 10), "sample 2: test true"),
        (lambda t: t["test"].poisoned.__setitem__(4, True), "sample 4: test: wrong about the trigger"),
        (lambda t: t["test_triggered"].poisoned.__setitem__(1, False), "sample 1: test_triggered: wrong"),
        (lambda t: t.pop("test"), "about train, test_triggered, not train, test"),
    ],
)
def test_the_truth_is_held_against_everything(change, says, digits_copy, damaged):
    truth = dict(read_truth(digits_copy))
    change(truth)
    write_truth(digits_copy, truth)
    seal(digits_copy)
    assert says in damaged(digits_copy)
    (digits_copy / "truth.parquet").unlink()
    seal(digits_copy)
    assert "there is an attack, and no truth.parquet" in damaged(digits_copy)


def test_a_table_of_other_length(digits_copy, damaged):
    samples = dict(read_samples(digits_copy))
    short = {"train": type(samples["train"])(samples["train"].label[:-1], samples["train"].origin[:-1])}
    write_samples(digits_copy, samples | short)
    seal(digits_copy)
    assert "samples.parquet: 239 samples, the manifest says 240" in damaged(digits_copy)
    write_samples(digits_copy, samples | {"train": type(samples["train"])(np.zeros(400, int), ["x"] * 400)})
    seal(digits_copy)
    assert "the table has 450 rows. Expected: at most 340" in damaged(digits_copy)
    seal(digits_copy, counts={"train": 241, "test": 50, "test_triggered": 50})
    assert "train.beton: holds 240 images, the manifest says 241" in damaged(digits_copy)


def test_several_folders_are_all_looked_at(digits, digits_copy, tmp_path, damaged, capsys):
    (digits_copy / "preview.png").unlink()
    message = damaged(digits_copy, digits, tmp_path)
    assert "2 of 3 are damaged" in message
    assert "preview.png: the file is missing" in message
    assert "nothing to check" in message


def test_an_artefact(tmp_path, capsys, damaged):
    arrays = {"pattern": np.zeros((8, 8, 3), np.uint8), "mask": np.full((8, 8), 26, np.uint8)}
    folder = tmp_path / "art"
    about = {"settings": {}, "evidence": {}, "versions": {}}
    write_artefact(folder, "adaptive", arrays, image_px=8, target=3, fingerprint="f" * 64, **about)
    assert main(["doctor", str(folder)]) == 0
    assert "adaptive, target 3, 8 px" in capsys.readouterr().out
    path = folder / "artefact.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "artefact.npz: damaged" in damaged(folder)


def test_a_run(tmp_path, digits, smoke_config, capsys, damaged, edit_json):
    folder, dataset = RunFolder(tmp_path / "run"), open_dataset(digits)
    folder.claim(smoke_config, dataset)
    folder.write_model(Classifier(smoke_config.model, 10).state_dict(), smoke_config, dataset, TrainConfig().normalise)
    assert main(["doctor", str(folder.path)]) == 0
    assert "model     sha256 as in the description" in capsys.readouterr().out
    path = folder.path / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in description.items() if k not in ("weights", "checksum")}))
    assert main(["doctor", str(folder.path)]) == 0
    said = capsys.readouterr()
    assert "NOT vouched for" in said.out
    assert "note: " in said.err
    assert "early version" in said.err
    path.write_text(json.dumps(description))
    (folder.path / "result.json").write_text("{}")
    assert "result.json: field method" in damaged(folder.path)
