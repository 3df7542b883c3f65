"""What can be searched: named spaces of dotted fields."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Space:
    """Fields to vary, each over the listed values: the whole grid is run."""

    grid: Mapping[str, tuple[Any, ...]]
    shared_stage: str | None
    """The last stage that no trial changes: trained once, for all of them."""
    why: str

    @property
    def points(self) -> list[dict[str, Any]]:
        """The whole grid: a value for every field, one trial each."""
        return [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]

    @property
    def size(self) -> int:
        """Trials in the whole grid."""
        return len(self.points)


SPACES: dict[str, Space] = {
    "sce": Space(
        grid={
            "split.keep": (0.3, 0.5, 0.7),
            "warmup.sce_alpha": (0.1, 1.0),
            "warmup.sce_beta": (0.1, 1.0),
        },
        shared_stage="simclr",
        why="the filtering ratio and both weights of symmetric cross-entropy",
    ),
    "filter": Space(
        grid={"split.keep": (0.1, 0.3, 0.5, 0.7, 0.9)},
        shared_stage="warmup",
        why="the filtering ratio alone, as in the paper's appendix",
    ),
}

SMOKE: dict[str, dict[str, tuple[Any, ...]]] = {
    "sce": {"split.keep": (0.4, 0.6), "warmup.sce_alpha": (0.1, 1.0), "warmup.sce_beta": (0.1, 1.0)},
    "filter": {"split.keep": (0.2, 0.4, 0.6, 0.8)},
}
"""Smaller grids for a trial of the machinery."""


def space(name: str, *, smoke: bool) -> Space:
    """The space of that name.

    Raises:
        UserError: there is none.
    """
    if name not in SPACES:
        raise UserError(f"there is no space {name!r}", where="dbd tune", expected=", ".join(SPACES))
    found = SPACES[name]
    if not smoke:
        return found
    return Space(grid=SMOKE[name], shared_stage=found.shared_stage, why=found.why)
