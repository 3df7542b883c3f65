"""What a search space is: fields to vary, the values that each may take, and a sentence on why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

GRID_STEPS = 5
"""Values that a grid takes of a range which names none."""


@dataclass(frozen=True)
class Choice:
    """One of the listed values."""

    values: tuple[Any, ...]

    def points(self) -> tuple[Any, ...]:
        """What a grid takes."""
        return self.values

    def bounds(self) -> tuple[Any, ...]:
        """Values that stand for all, to be checked."""
        return self.values

    def at(self, share: float) -> Any:
        """The value at a share in [0, 1) of the range: uniform shares give the distribution."""
        return self.values[int(share * len(self.values))]

    def holds(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"choice({', '.join(map(repr, self.values))})"


@dataclass(frozen=True, kw_only=True)
class Range:
    """Every number from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    """Equal chances for equal ratios, not differences."""
    whole: bool = False
    """Whole numbers only."""
    grid: tuple[Any, ...] = ()
    """The values that a grid takes; `GRID_STEPS` even ones unless given."""

    def points(self) -> tuple[Any, ...]:
        even = (self.at(i / (GRID_STEPS - 1)) for i in range(GRID_STEPS))
        return self.grid or tuple(dict.fromkeys(even))

    def bounds(self) -> tuple[Any, ...]:
        return (self.low, self.high)

    def at(self, share: float) -> Any:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.whole else float(f"{value:.6g}")

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def __str__(self) -> str:
        name = ("log" if self.log else "") + ("int" if self.whole else "uniform")
        return f"{name}({self.low!r}, {self.high!r})"


Distribution = Choice | Range


def choice(*values: Any) -> Choice:
    """One of some values."""
    return Choice(values)


def uniform(low: float, high: float, grid: tuple[float, ...] = ()) -> Range:
    """A number between two others."""
    return Range(low=low, high=high, grid=grid)


def loguniform(low: float, high: float, grid: tuple[float, ...] = ()) -> Range:
    """A positive number; equal chances for equal ratios."""
    return Range(low=low, high=high, log=True, grid=grid)


def integer(low: int, high: int, grid: tuple[int, ...] = ()) -> Range:
    """A whole number."""
    return Range(low=low, high=high, whole=True, grid=grid)


def logint(low: int, high: int, grid: tuple[int, ...] = ()) -> Range:
    """A positive whole number; equal chances for equal ratios."""
    return Range(low=low, high=high, whole=True, log=True, grid=grid)


@dataclass(frozen=True, kw_only=True)
class Space:
    """Fields to vary by their dotted names."""

    vary: Mapping[str, Distribution]
    """Fields of a run's configuration ("split.keep"); for attacks also of the craft and of `dbd prepare`
    ("craft.steps", "prepare.rate")."""
    smoke: Mapping[str, Distribution] = field(default_factory=dict)
    """What a trial of the machinery varies, a few points of a grid; `vary` where it is empty."""
    why: str
    """What is varied, and why within these bounds."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """How it is searched unless the command says."""
    trials: int = 20
    """How many, unless the command says; a grid has its own number."""
    attacks: bool = False
    """It varies an attack, which each trial crafts and puts into a data set of its own."""

    def __add__(self, other: Space) -> Space:
        """Both spaces together."""
        return Space(
            vary={**self.vary, **other.vary},
            smoke={**(self.smoke or self.vary), **(other.smoke or other.vary)},
            why=f"{self.why}; {other.why}",
            search="grid" if self.search == other.search == "grid" else "tpe",
            trials=max(self.trials, other.trials),
            attacks=self.attacks or other.attacks,
        )


def combinations(vary: Mapping[str, Distribution]) -> int | None:
    """How many there are of listed values; None where a field has a range."""
    if not all(isinstance(given, Choice) for given in vary.values()):
        return None
    return math.prod(len(given.points()) for given in vary.values())


def grid(vary: Mapping[str, Distribution]) -> list[dict[str, Any]]:
    """Every combination of the fields' points."""
    return [dict(zip(vary, values)) for values in itertools.product(*(d.points() for d in vary.values()))]
