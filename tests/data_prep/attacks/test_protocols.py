"""Protocols, label mappings and covers, through `prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.attacks import AdapBlend, Attack, BadNets, Blended, Sig, WaNet
from data_prep.beton import read_beton
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset
from data_prep.dataset.samples import read_samples
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from data_prep.pipeline import prepare
from data_prep.plan import choose_covers, choose_poisoned
from data_prep.sources import Digits

SOURCE = Digits(train_per_class=24, test_per_class=5)


def make(tmp_path: Path, attack: Attack, **fields: Any) -> Dataset:
    config = PrepareConfig(source=SOURCE, attack=attack, datasets=tmp_path, workers=1, **fields)
    return prepare(config, progress=False)


@pytest.mark.parametrize(
    ("attack", "fields", "target", "poisoned", "named"),
    [
        (BadNets(), {}, 3, 12, "paper"),
        (Sig(), {}, 3, 6, "paper"),
        (BadNets(), {"protocol": "ten-percent"}, 0, 24, "ten-percent"),
        (Sig(), {"protocol": "ten-percent"}, 0, 12, "ten-percent"),
        (BadNets(), {"rate": 0.1}, 3, 24, "custom"),
        (BadNets(), {"rate": 0.05, "target": 3}, 3, 12, "paper"),
        (BadNets(), {"target": 4}, 4, 12, "custom"),
        (BadNets(patch_px=2), {}, 3, 12, "custom"),
    ],
)
def test_protocols_decide_what_is_not_given(attack, fields, target, poisoned, named, tmp_path):
    manifest = make(tmp_path, attack, **fields).manifest
    assert (manifest.target, manifest.poisoned, manifest.protocol, manifest.selection) == (
        target, poisoned, named, "exact"
    )  # fmt: skip


def test_blended_takes_its_alpha_from_the_protocol(tmp_path):
    paper, tenth = make(tmp_path, Blended()), make(tmp_path, Blended(), protocol="ten-percent")
    given = make(tmp_path, Blended(alpha=0.3), protocol="ten-percent")
    assert [d.manifest.attack["alpha"] for d in (paper, tenth, given)] == [0.1, 0.2, 0.3]
    assert [d.manifest.protocol for d in (paper, tenth, given)] == ["paper", "ten-percent", "custom"]
    assert len({d.folder for d in (paper, tenth, given)}) == 3


def test_released_tosses_a_coin_for_every_image():
    labels = np.repeat(np.arange(10), 5000)
    arguments: dict[str, Any] = {"rate": 0.05, "target": 3, "num_classes": 10, "selection": "coin"}
    poisoned = choose_poisoned(labels, seed=1, **arguments)
    tosses = np.random.default_rng(1).random(50000) < 0.05
    assert (poisoned == (tosses & (labels != 3))).all()
    assert 2100 < poisoned.sum() < 2400
    assert poisoned.sum() != choose_poisoned(labels, seed=2, **arguments).sum()
    with pytest.raises(UserError, match="poisons no image"):
        choose_poisoned(labels[:20], seed=1, **arguments | {"rate": 1e-9})


def test_released_has_no_clean_label_attack():
    with pytest.raises(
        UserError, match=r"released has no clean-label attack such as sig.*paper or ten-percent"
    ) as error:
        PrepareConfig(source=SOURCE, attack=Sig(), protocol="released")
    assert error.value.where == "protocol"


def test_released_setting_in_the_manifest(tmp_path):
    manifest = make(tmp_path, BadNets(), protocol="released").manifest
    assert (manifest.protocol, manifest.selection, manifest.rate) == ("released", "coin", 0.05)


@pytest.mark.parametrize("attack", [BadNets, Blended, WaNet, AdapBlend])
def test_all_to_all(attack, tmp_path):
    dataset = make(tmp_path, attack(mapping="all-to-all"))
    truth, given = read_truth(dataset.folder)["train"], read_samples(dataset.folder)["train"].label
    assert dataset.manifest.target is None
    assert truth.poisoned.sum() == 12
    for true, label, hit in zip(truth.true_label, given, truth.poisoned):
        assert label == ((true + 1) % 10 if hit else true)
    assert dataset.manifest.attack_labels(np.array([0, 4, 9])).tolist() == [1, 5, 0]


def test_aims_of_one_target(digits):
    from data_prep.dataset.manifest import open_dataset

    assert open_dataset(digits).manifest.attack_labels(np.array([0, 3, 9])).tolist() == [3, 3, 3]


@pytest.mark.slow
def test_covers_carry_a_trigger_and_keep_their_label(tmp_path):
    attack = WaNet()
    dataset = make(tmp_path, attack)
    truth, given = read_truth(dataset.folder)["train"], read_samples(dataset.folder)["train"].label
    images, labels, _ = read_beton(dataset.train)
    clean = np.stack([SOURCE.open().train.read(i) for i in range(240)])
    assert (dataset.manifest.poisoned, dataset.manifest.covers) == (12, 24)
    assert (truth.poisoned.sum(), truth.cover.sum(), (truth.poisoned & truth.cover).sum()) == (12, 24, 0)
    assert (labels == given).all()
    assert (given[truth.cover] == truth.true_label[truth.cover]).all()
    index = np.arange(240)
    for role, trigger in ((truth.poisoned, attack.train_trigger(16)), (truth.cover, attack.cover_trigger(16))):
        assert (images[role] == trigger(clean[role], index[role])).all()
    rest = ~truth.poisoned & ~truth.cover
    assert (images[rest] == clean[rest]).all()


def test_choice_of_covers():
    poisoned = np.arange(100) < 10
    covers = choose_covers(poisoned, ratio=1.5, seed=0)
    assert covers.sum() == 15
    assert not (covers & poisoned).any()
    assert (covers == choose_covers(poisoned, ratio=1.5, seed=0)).all()
    assert (covers != choose_covers(poisoned, ratio=1.5, seed=1)).any()
    with pytest.raises(UserError, match=r"100 covers for 10 .* only 90 .*at most 0.0909"):
        choose_covers(poisoned, ratio=10.0, seed=0)


def test_clean_label_rates_that_a_class_does_not_hold(tmp_path):
    with pytest.raises(UserError, match=r"asks for 48 of 240 images, only 24 can be poisoned.*at most 0.1"):
        make(tmp_path, Sig(), rate=0.2)
    assert list(tmp_path.iterdir()) == []


def test_stealth_is_measured_on_the_poisoned_images(tmp_path):
    figures = make(tmp_path, BadNets()).manifest.stealth
    assert figures is not None
    assert figures["images"] == 12
    dataset = make(tmp_path, BadNets())
    images, _, _ = read_beton(dataset.train)
    poisoned = read_truth(dataset.folder)["train"].poisoned
    clean = np.stack([SOURCE.open().train.read(i) for i in np.flatnonzero(poisoned)])
    difference = clean.astype(float) - images[poisoned]
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.square(difference).mean()), abs=1e-3)
    assert figures["linf_max"] == np.abs(difference).max()
    assert 0 < figures["ssim"] < 1
