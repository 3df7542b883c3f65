"""Arguments of a benchmark, and the rows that it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_prep.dataset.manifest import Dataset


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The surroundings of all benchmarks of one run."""

    dataset: Dataset
    scratch: Path
    """A folder to write to; removed at the end."""
    device: torch.device
    repeats: int = 5
    quick: bool = False
    """Small work, to see that everything runs; its figures say little."""
    threads: int = 1
    """Of torch on the CPU."""

    def pick(self, *, cuda: int, cpu: int, quick: int) -> int:
        """A size that suits the device."""
        return quick if self.quick else cuda if self.device.type == "cuda" else cpu

    @property
    def clock(self) -> Callable[[], float]:
        """For work on the CPU: the process's own time where one thread does it, which no neighbour adds to."""
        return time.process_time if self.threads == 1 else time.perf_counter

    @property
    def precision(self) -> str:
        return "bf16" if self.bf16 else "fp32"

    @property
    def bf16(self) -> bool:
        """As `compute.precision auto` decides."""
        from dbd_dist.config import ComputeConfig
        from dbd_dist.runtime.computing import uses_bf16

        return uses_bf16(ComputeConfig(), self.device)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, measured several times."""

    bench: str
    name: str
    unit: str
    values: Sequence[float]
    """One a repeat."""
    floor: float | None = None
    """What no implementation on this device could beat, in the same unit."""
    floor_is: str = ""
    """Where the floor comes from."""
    reference: str | None = None
    """Name of the row that `ratio` compares with."""
    ratio: float | None = None
    """The reference's figure over this one: median over repeats, each taken within one."""
    notes: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "name": self.name,
            "unit": self.unit,
            "median": median(self.values),
            "least": min(self.values),
            "most": max(self.values),
            "n": len(self.values),
            "floor": self.floor,
            "floor_is": self.floor_is,
            "reference": self.reference,
            "ratio": self.ratio,
            **self.notes,
        }


def ratio(reference: Sequence[float], mine: Sequence[float]) -> float:
    """How many times less `mine` is, repeat by repeat."""
    return median(theirs / ours for theirs, ours in zip(reference, mine, strict=True))


HEADINGS = ("benchmark", "what", "median", "least - most", "n", "unit", "floor", "x floor", "ratio to reference")


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" * len(HEADINGS) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(cells(row)) + " |")
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    middle = median(row.values)
    notes = ", ".join(f"{name} {_short(value)}" for name, value in row.notes.items() if isinstance(value, int | float))
    return [
        row.bench,
        row.name + (f" ({notes})" if notes else ""),
        _short(middle),
        f"{_short(min(row.values))} - {_short(max(row.values))}",
        str(len(row.values)),
        row.unit,
        "" if row.floor is None else _short(row.floor),
        "" if not row.floor else f"{middle / row.floor:.2f}",
        "" if row.ratio is None else f"{row.ratio:.2f} ({row.reference})",
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
