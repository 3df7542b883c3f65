"""The named grids: every point is a configuration, and no point changes the stage that all share."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.config import override
from dbd_dist.presets import preset
from dbd_dist.runtime import keys
from tune_spaces.space import Space
from tune_spaces.spaces import SPACES, space

EVERY = [(name, smoke) for name in SPACES for smoke in (False, True)]


def points(chosen: Space) -> list[dict[str, Any]]:
    """The grid in loops."""
    found: list[dict[str, Any]] = [{}]
    for field, values in chosen.grid.items():
        found = [point | {field: value} for point in found for value in values]
    return found


@pytest.mark.parametrize(("name", "smoke"), EVERY)
def test_every_point_is_another_configuration(name, smoke):
    chosen = space(name, smoke=smoke)
    base = preset("smoke" if smoke else "demo").config()
    configs = [override(base, point) for point in points(chosen)]
    assert all(a != b for a, b in itertools.combinations(configs, 2))
    assert chosen.points == points(chosen)
    assert chosen.size == len(configs) >= 4


@pytest.mark.parametrize(("name", "smoke"), EVERY)
def test_no_point_changes_the_shared_stage_and_all_change_what_follows(name, smoke, digits):
    chosen = space(name, smoke=smoke)
    assert chosen.shared_stage is not None
    base = preset("smoke").config()
    found = [stage_keys(override(base, point), digits) for point in points(chosen)]
    assert len({key[chosen.shared_stage] for key in found}) == 1
    assert len({key["mixmatch"] for key in found}) == chosen.size


def stage_keys(config, digits) -> dict[str, str]:
    """What the pipeline finds stages by."""
    return keys.stage_keys(config, open_dataset(digits), bf16=False)


@pytest.mark.parametrize("name", SPACES)
def test_a_smoke_run_varies_the_same_fields(name):
    assert space(name, smoke=True).grid.keys() == space(name, smoke=False).grid.keys()
    assert space(name, smoke=True).shared_stage == space(name, smoke=False).shared_stage


def test_size_of_a_grid():
    assert Space(grid={"a": (1, 2, 3), "b": (1, 2)}, shared_stage=None, why="").size == 6
    assert Space(grid={}, shared_stage=None, why="").size == 1


def test_unknown_space_names_those_there_are():
    with pytest.raises(UserError, match=r"'everything'.*sce, filter"):
        space("everything", smoke=False)
