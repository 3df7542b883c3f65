"""Methods as lists of stages: what they need of each other, of presets, and what follows from the list."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.fields import digest
from dbd_dist.methods import DBD, METHODS, Method, NoDefense
from dbd_dist.presets import PRESETS, preset
from dbd_dist.runtime.keys import stage_keys
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
@pytest.mark.parametrize("method", ["dbd", "none"])
def test_configurations_survive_the_way_through_json(name, method):
    config = preset(name).config(method)
    assert TrainConfig.from_dict(config.to_dict()) == config


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
    simclr = digest([around, values["simclr"]])
    warmup = digest([simclr, values["warmup"]])
    mixmatch = digest([warmup, values["split"], values["mixmatch"]])
    found = stage_keys(smoke_config, dataset, bf16=False)
    assert found == {"simclr": simclr, "warmup": warmup, "mixmatch": mixmatch}
    plain = digest([around, smoke_none.to_dict()["supervised"]])
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


def test_registries_name_what_they_hold():
    assert list(METHODS) == ["dbd", "none"]
    assert [METHODS[name] for name in METHODS] == [DBD, NoDefense]
    assert [STAGES[name] for name in STAGES] == [SimCLR, Warmup, Split, MixMatch, Supervised]
