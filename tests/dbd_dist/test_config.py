"""Fields changed by dotted names."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.fields import to_dict
from dbd_dist.runtime import disk, runner, watchdog
from dbd_dist.runtime.keys import method_hash, stage_keys


def changed(config: TrainConfig, other: TrainConfig) -> dict[str, object]:
    """The fields in which two configurations differ, by dotted names."""

    def flat(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}.")
            else:
                yield prefix + name, value

    before = dict(flat(to_dict(config)))
    return {name: value for name, value in flat(to_dict(other)) if value != before[name]}


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 3},
        {"split.keep": 0.25},
        {"split.keep": 0.25, "warmup.sce_alpha": 2.0, "seed": 1},
        {"simclr.augment.jitter_p": 0.125},
        {"compute.workers": 4},  # None before
    ],
)
def test_named_fields_change_and_no_others(values):
    assert changed(TrainConfig(), override(TrainConfig(), values)) == values


def test_the_original_stays_as_it_was():
    config = TrainConfig()
    override(config, {"model.widths": [8, 16, 32, 64], "split.keep": 0.1})
    assert config == TrainConfig()


def test_nothing_to_change():
    config = TrainConfig(data=Path("somewhere"), seed=5)
    assert override(config, {}) == config


def test_types_are_those_of_the_fields():
    config = override(TrainConfig(), {"model.widths": [8, 16, 32, 64], "mixmatch.lambda_u": 3, "data": "here"})
    assert config.model.widths == (8, 16, 32, 64)
    assert isinstance(config.method.mixmatch.lambda_u, float)
    assert config.data == Path("here").absolute()


@pytest.mark.parametrize("name", ["kept", "split.kept", "splits.keep", "seed.keep", "split.keep.more", "", "split."])
def test_fields_that_do_not_exist(name):
    with pytest.raises(UserError, match="there is no such field") as caught:
        override(TrainConfig(), {name: 1})
    assert caught.value.where == name
    assert "warmup" in str(caught.value.expected)


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        ("split.keep", 1.5, "split.keep"),
        ("split.keep", "half", "config.split.keep"),
        ("warmup.loss", "focal", "config.warmup.loss"),
        ("warmup.epochs", 2.5, "config.warmup.epochs"),
        ("split", 0.5, "config.split"),
    ],
)
def test_values_are_checked_as_in_any_configuration(name, value, where):
    with pytest.raises(UserError) as caught:
        override(TrainConfig(), {name: value})
    assert caught.value.where == where


def test_places_of_a_list_have_numbers():
    before = TrainConfig()
    after = override(before, {"simclr.augment.scale.0": 0.4})
    assert changed(before, after) == {"simclr.augment.scale": [0.4, before.method.stages()[0].augment.scale[1]]}
    with pytest.raises(UserError, match="there is no such field"):
        override(before, {"simclr.augment.scale.2": 0.4})


def test_a_field_that_does_not_exist_names_the_nearest():
    with pytest.raises(UserError, match=r"split\.kep: there is no such field.*did you mean split\.keep\?"):
        override(TrainConfig(), {"split.kep": 0.4})


def numeric(values: dict, prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numeric(value, f"{prefix}{name}.")
        elif isinstance(value, int | float | None) and not isinstance(value, bool):
            yield prefix + name


@pytest.mark.parametrize(
    "value",
    [10**400, -(10**400), 1e308, -1e308, 1e-320],
    ids=["long", "-long", "1e308", "-1e308", "tiny"],
)
@pytest.mark.parametrize("method", ["dbd", "none"])
def test_no_figure_is_too_large_or_small_for_what_is_checked_at_the_start(
    method, value, smoke_config, smoke_none, digits
):
    config, dataset = {"dbd": smoke_config, "none": smoke_none}[method], open_dataset(digits)
    for name in numeric(config.to_dict(every_field=True)):
        try:
            found = override(config, {name: value})
            runner.check(found, dataset, 1)
        except UserError:
            continue
        if name.endswith(("epochs", "steps")):
            assert disk.of_run(found, dataset).total > 0
        assert timedelta(seconds=watchdog.collective_timeout_s(found.compute.stall_s)).days < 200
        assert stage_keys(found, dataset, bf16=False)
        assert method_hash(found)
