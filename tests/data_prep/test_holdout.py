"""Clean images set aside before poisoning: `dbd prepare --holdout-clean`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_prep.attacks import BadNets, NoAttack
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.dataset.samples import read_origins
from data_prep.dataset.truth import read_truth
from data_prep.dataset.verify import verify_dataset
from data_prep.errors import UserError
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from data_prep.sources.classes import holdout
from dbd_dist.cli import main

SOURCE = Digits(train_per_class=20, test_per_class=3)


def make(out, **changes) -> Dataset:
    config = PrepareConfig(source=SOURCE, attack=BadNets(), rate=0.1, out=out, workers=1, holdout_clean=0.2)
    return prepare(replace(config, **changes), progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Dataset:
    return make(tmp_path_factory.mktemp("holdout") / "made")


def images_of(path) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = read_beton(path)
    return images, labels


def test_the_holdout_is_clean_even_and_no_part_of_train(made, tmp_path):
    manifest = made.manifest
    assert manifest.holdout_clean == 0.2
    assert dict(manifest.counts) == {"train": 160, "test": 30, "test_triggered": 30, "holdout": 40}
    assert manifest.poisoned == 16  # of those that are left
    assert made.holdout is not None
    images, labels = images_of(made.holdout)
    assert np.bincount(labels).tolist() == [4] * 10
    aside, left = read_origins(made.folder, "holdout"), read_origins(made.folder)
    assert not set(aside) & set(left)
    # every image is the source's own, found by where it came from
    source = SOURCE.open().train
    origins = {source.origin(i): i for i in range(len(source))}
    assert sorted([*aside, *left]) == sorted(origins)
    for image, label, origin in zip(images, labels, aside, strict=True):
        assert np.array_equal(image, source.read(origins[origin]))
        assert label == source.labels[origins[origin]]
    truth = read_truth(made.folder)["holdout"]
    assert not (truth.poisoned | truth.cover).any()
    assert truth.true_label.tolist() == labels.tolist()


def test_without_the_flag_nothing_is_set_aside(digits):
    dataset = open_dataset(digits)
    assert dataset.manifest.holdout_clean is None
    assert dataset.holdout is None
    assert not (digits / "holdout.beton").exists()


def test_the_draw_is_that_of_the_images_not_of_the_poison(made, tmp_path):
    """So that a clean data set and all its poisoned versions set the same images aside."""
    other = make(tmp_path / "seed", seed=5, rate=0.2)
    clean = make(tmp_path / "clean", attack=NoAttack(), rate=None)
    for same in (other, clean):
        assert same.manifest.content_hash["holdout"] == made.manifest.content_hash["holdout"]
    drawn = make(tmp_path / "drawn", source=replace(SOURCE, subset_seed=1))
    assert drawn.manifest.content_hash["holdout"] != made.manifest.content_hash["holdout"]


def test_the_name_says_it_and_another_share_is_another_data_set(made, tmp_path):
    assert make(None, datasets=tmp_path).folder.name == "digits-20pc-h0.2-badnets-r0.1-t3-s0"
    with pytest.raises(UserError, match=r"its --holdout-clean is 0\.2, not 0\.1"):
        make(made.folder, holdout_clean=0.1)
    with pytest.raises(UserError, match=r"its --holdout-clean is 0\.2, here it is not given"):
        make(made.folder, holdout_clean=None)


def test_the_doctor_looks_at_it_too(made):
    checks = {passed.name: passed.detail for passed in verify_dataset(made.folder, progress=False)}
    assert "holdout 40 samples" in checks["tables"]
    assert "260 decoded" in checks["images"]


def test_shares_are_rounded_by_class_and_hold_one_image_at_least():
    labels = np.repeat([0, 1, 2], [100, 30, 3])
    drawn = holdout(labels, 0.05, "abc", np.random.default_rng(0), where="share")
    assert np.bincount(labels[drawn]).tolist() == [5, 2, 1]
    with pytest.raises(UserError, match=r"0\.9 of class 2 \(c\) are 3 of its 3 training images"):
        holdout(labels, 0.9, "abc", np.random.default_rng(0), where="share")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--holdout-clean", "0"], "strictly between 0 and 1"),
        (["--holdout-clean", "1.5"], "--holdout-clean"),
        (["--holdout-clean", "nan"], "--holdout-clean"),
        (["--holdout-clean", "0.99", "--train-per-class", "10"], "none is left"),
        (["--holdout-clean", "0.1", "--untrusted"], "nobody knows which are clean"),
    ],
)
def test_what_cannot_be_set_aside_is_refused_by_its_flag(flags, says, tmp_path, capsys):
    assert main(["prepare", "digits", "clean", *flags, "--datasets", str(tmp_path / "datasets")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--holdout-clean" in error
    assert says in error
    assert not (tmp_path / "datasets").exists()
