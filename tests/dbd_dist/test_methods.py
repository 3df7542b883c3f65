"""Methods as lists of stages: what they need of each other, of presets, and what follows from the list."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
import torch

from data_prep.attacks import BadNets
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io.hashes import data_hash
from dbd_dist.config import TrainConfig, override
from dbd_dist.data import augment
from dbd_dist.data.loaders import open_images
from dbd_dist.fields import digest
from dbd_dist.launch.start import check_before_data
from dbd_dist.methods import DBD, METHODS, Method, NoDefense
from dbd_dist.presets import PRESETS, preset
from dbd_dist.runtime.keys import stage_keys
from dbd_dist.runtime.runner import check
from dbd_dist.stages import STAGES, MixMatch, SimCLR, Split, Stage, Supervised, Warmup


@dataclass(frozen=True, kw_only=True)
class HeadFirst(Method):
    """Warms a head up before there is a backbone."""

    name: ClassVar[str] = "head-first"
    title: ClassVar[str] = "Head first"

    warmup: Warmup = field(default_factory=Warmup)
    simclr: SimCLR = field(default_factory=SimCLR)


@dataclass(frozen=True, kw_only=True)
class Other(Stage):
    """A stage that no preset knows."""

    name: ClassVar[str] = "other"
    title: ClassVar[str] = "Other"
    gives: ClassVar[tuple[str, ...]] = ("model",)

    epochs: int = 1


@dataclass(frozen=True, kw_only=True)
class WithOther(Method):
    name: ClassVar[str] = "with-other"
    title: ClassVar[str] = "With another"
    defaults: ClassVar = {"smoke": {"other": Other(epochs=7)}}

    other: Other = field(default_factory=Other)


def test_a_stage_that_reads_what_nobody_gives_is_refused():
    with pytest.raises(
        UserError, match=r"method head-first: the stage warmup reads backbone, which no stage before it"
    ):
        HeadFirst()


def test_a_method_without_a_model_or_with_a_name_twice_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class NoModel(Method):
        name: ClassVar[str] = "no-model"
        title: ClassVar[str] = "No model"
        simclr: SimCLR = field(default_factory=SimCLR)

    @dataclass(frozen=True, kw_only=True)
    class Twice(Method):
        name: ClassVar[str] = "twice"
        title: ClassVar[str] = "Twice"
        first: Supervised = field(default_factory=Supervised)
        second: Supervised = field(default_factory=Supervised)

    with pytest.raises(UserError, match="no stage gives a model"):
        NoModel()
    with pytest.raises(UserError, match="two stages have one name"):
        Twice()


def test_settings_come_from_the_preset_then_from_the_method():
    stages = {stage.name: stage for stage in preset("demo").stages}
    assert DBD.from_stages(stages, "demo").simclr == stages["simclr"]
    assert WithOther.from_stages(stages, "smoke").other.epochs == 7
    with pytest.raises(UserError, match="the preset demo has no settings for other, a stage of with-other"):
        WithOther.from_stages(stages, "demo")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_configurations_survive_the_way_through_json(name, method):
    config = preset(name).config(method)
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_released_presets_are_as_the_release_is():
    """Figures of the authors' code for CIFAR-10: a patch of 2 px at row and column 4, a coin, an unbounded blur, a
    baseline that pads with black (BadNets) or crops at random (Blended)."""
    badnets, blended = preset("cifar10_badnets_released"), preset("cifar10_blended_released")
    for each in (badnets, blended):
        simclr = each.config().method.simclr
        assert (simclr.epochs, simclr.schedule_epochs, simclr.symmetric) == (100, 1000, False)
        assert augment.blur_kernel_px(simclr.augment, 32, 32) == 13
        assert not each.config().method.warmup.freeze_batch_norm
        made = each.prepare
        assert (made.protocol, made.decided.selection, made.poison_rate, made.poison_target) == (
            "released", "coin", 0.05, 3
        )  # fmt: skip
        weak = each.config().method.mixmatch.augment
        assert (weak.crop, weak.pad_px, weak.padding) == ("pad", 4, "reflect")
    assert BadNets.patch(badnets.prepare.attack, 32)[0].shape == (2, 2, 3)
    assert BadNets.patch(badnets.prepare.attack, 32)[1:] == (4, 4)
    assert blended.prepare.poison.alpha == 0.1
    padded, cropped = (each.config("none").method.supervised.augment for each in (badnets, blended))
    assert (padded.crop, padded.pad_px, padded.padding) == ("pad", 4, "zeros")
    assert (cropped.crop, cropped.scale, cropped.interpolation) == ("random_resized", (0.2, 1.0), "bicubic")
    assert (cropped.jitter_p, cropped.grayscale_p, cropped.blur_p, cropped.mean) == (0, 0, 0, augment.CIFAR_MEAN)
    for name in ("cifar10_badnets", "imagenet_subset_badnets"):
        assert preset(name).config().method.simclr.augment.blur_kernel == "simclr"
        assert preset(name).prepare.protocol == "paper"


def test_a_configuration_of_version_0_1_is_read():
    """It held the settings of all methods."""
    new = preset("smoke").config("none")
    old = preset("smoke").config("dbd").to_dict() | new.to_dict()
    assert {"simclr", "supervised"} <= old.keys()
    assert TrainConfig.from_dict(old) == new


def test_keys_by_hand(smoke_config, smoke_none, digits):
    """Each over its settings and the keys of what it reads from; the split has no key of its own."""
    dataset = open_dataset(digits)
    values = smoke_config.to_dict()
    around = {
        "revision": 3, "data": dataset.manifest.data_hash, "seed": 0, "model": values["model"], "bf16": False,
        "sync_bn": True,
    }  # fmt: skip
    classes = {"classes": 10}
    simclr = digest([around, values["simclr"]])
    warmup = digest([simclr, classes, values["warmup"]])
    mixmatch = digest([warmup, values["split"], classes, values["mixmatch"]])
    found = stage_keys(smoke_config, dataset, bf16=False)
    assert found == {"simclr": simclr, "warmup": warmup, "mixmatch": mixmatch}
    plain = digest([around, classes, smoke_none.to_dict()["supervised"]])
    assert stage_keys(smoke_none, dataset, bf16=False) == {"supervised": plain}


def test_a_revision_of_one_stage_changes_its_key_and_those_after(smoke_config, digits, monkeypatch):
    dataset = open_dataset(digits)
    before = stage_keys(smoke_config, dataset, bf16=False)
    monkeypatch.setattr(Warmup, "revision", 1)
    after = stage_keys(smoke_config, dataset, bf16=False)
    assert before["simclr"] == after["simclr"]
    assert before["warmup"] != after["warmup"]
    assert before["mixmatch"] != after["mixmatch"]


def test_where_a_run_may_stop(smoke_config, smoke_none):
    assert replace(smoke_config, stop_after="warmup").stop_after == "warmup"
    for config, stage in ((smoke_config, "mixmatch"), (smoke_config, "split"), (smoke_none, "supervised")):
        with pytest.raises(UserError, match="--stop-after"):
            replace(config, stop_after=stage)


def test_no_epoch_needs_given_weights(smoke_config):
    with pytest.raises(UserError, match=r"simclr\.epochs: no epoch of training"):
        override(smoke_config, {"simclr.epochs": 0})


@dataclass(frozen=True, kw_only=True)
class OnClean(Stage):
    """Reads the clean images alone."""

    name: ClassVar[str] = "on-clean"
    title: ClassVar[str] = "On clean images"
    gives: ClassVar[tuple[str, ...]] = ("model",)
    on_clean: ClassVar[bool] = True

    epochs: int = 1
    batch: int = 4


@dataclass(frozen=True, kw_only=True)
class NeedsClean(Method):
    name: ClassVar[str] = "needs-clean"
    title: ClassVar[str] = "Needing clean images"
    needs_clean: ClassVar[bool] = True

    tune: OnClean = field(default_factory=OnClean)


def test_a_stage_on_clean_images_makes_a_method_say_so():
    @dataclass(frozen=True, kw_only=True)
    class Silent(Method):
        name: ClassVar[str] = "silent"
        title: ClassVar[str] = "Silent"
        tune: OnClean = field(default_factory=OnClean)

    with pytest.raises(UserError, match="does not say needs_clean"):
        Silent()


def test_clean_images_that_are_not_there_or_too_few_are_refused(digits, with_holdout, smoke_none):
    config = replace(smoke_none, method=NeedsClean())
    with pytest.raises(UserError, match="Needing clean images needs clean images, and this data set") as error:
        check(config, open_dataset(digits), 1)
    assert "--holdout-clean 0.05" in str(error.value.expected)
    with pytest.raises(UserError, match="--holdout-clean"):
        check_before_data(replace(config, data=digits), "run", "local")
    check(config, open_dataset(with_holdout), 1)
    too_large = replace(config, method=NeedsClean(tune=OnClean(batch=40)))
    with pytest.raises(UserError, match="a batch of 40 is larger than the data set: 20 clean images"):
        check(too_large, open_dataset(with_holdout), 1)


def test_the_key_of_a_stage_on_clean_images_is_that_of_their_content(with_holdout, smoke_none):
    """`data_hash` covers every split."""
    dataset, config = open_dataset(with_holdout), replace(smoke_none, method=NeedsClean())
    hashes = dict(dataset.manifest.content_hash) | {"holdout": "a" * 64}
    other = replace(dataset.manifest, content_hash=hashes, data_hash=data_hash(hashes))
    keys = [stage_keys(config, d, bf16=False) for d in (dataset, replace(dataset, manifest=other))]
    assert keys[0]["on-clean"] != keys[1]["on-clean"]


def test_a_context_reads_the_clean_images(with_holdout):
    dataset = open_dataset(with_holdout)
    held = {}
    for name, gib in (("resident", 1.0), ("streamed", 0.0)):
        clean = open_images(dataset, torch.device("cpu"), resident_gib=gib, threads=1, split="holdout")
        assert sorted(clean.labels.tolist()) == sorted(list(range(10)) * 2)
        held[name] = next(iter(clean.batches([torch.arange(20)])))
    assert torch.equal(held["resident"], held["streamed"])


def test_registries_name_what_they_hold():
    assert list(METHODS)[:2] == ["dbd", "none"]
    assert [METHODS[name] for name in METHODS][:2] == [DBD, NoDefense]
    assert [STAGES[name] for name in STAGES][:5] == [SimCLR, Warmup, Split, MixMatch, Supervised]
    for method in METHODS.values():  # flags of another method's stages are told from mistyped ones by their names
        assert all(kind.name == name for name, kind in method.stage_kinds().items())
        assert set(method.stage_kinds()) <= set(STAGES)


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [(190, 1024, 48), (80, 1024, 20), (15, 200, 15), (30, 40, 30), (16, 1000, 4), (8, 1000, 3), (100, 100, 30)],
)
def test_the_robust_method_fine_tunes_a_quarter_as_long_but_3000_steps_where_there_are_so_many(epochs, steps, expected):
    changed = preset("demo").change(mixmatch={"epochs": epochs, "steps": steps, "lr_schedule": "constant"})
    full, short = (changed.config(name).method.stages()[3] for name in ("dbd", "dbd-robust"))
    assert (full.epochs, full.lr_schedule) == (epochs, "constant")
    assert (short.epochs, short.steps) == (expected, steps)
    assert short.lr_schedule == ("constant" if expected == epochs else "cosine")
    assert short.augment == full.augment
