"""What a search space is: fields to vary, and a sentence on why."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Space:
    """Fields to vary by their dotted names, each over the listed values: the whole grid is run."""

    grid: Mapping[str, tuple[Any, ...]]
    smoke: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """A smaller grid over the same fields, for a trial of the machinery; the grid itself where it is empty."""
    shared_stage: str | None
    """The last stage that no trial changes: trained once, for all of them."""
    why: str
    """What is varied, and why these values."""

    @property
    def points(self) -> list[dict[str, Any]]:
        """The whole grid: a value for every field, one trial each."""
        return [dict(zip(self.grid, values)) for values in itertools.product(*self.grid.values())]

    @property
    def size(self) -> int:
        """Trials in the whole grid."""
        return len(self.points)
