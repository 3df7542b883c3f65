"""Curves over epochs: the loss of every stage, accuracy and attack success, what the filter kept.

Which there are follows from the rows of metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dbd_dist.reporting import figures, tables
from dbd_dist.reporting.runs import Run
from dbd_dist.reporting.shown import SHOWN_ROWS, finished, run_name, unfinished
from dbd_dist.reporting.tables import Row
from dbd_dist.reporting.wording import percent, printable

_MOST_STAGES = 8


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and what it says."""

    title: str
    drawing: Markup
    caption: str = ""
    by: str = ""
    """The run that it shows, where the title does not name it."""


def attacked(runs: Sequence[Run]) -> bool:
    """Is there attack success, or a filter, to show?"""
    return any(row.get("asr") is not None or row.get("kept_poisoned") for run in runs for row in run.metrics)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _line(rows: Iterable[Mapping[str, Any]], field: str, look: str, factor: float = 1.0) -> list[figures.Line]:
    """A curve where there are finite numbers, else none."""
    pairs = [(row["epoch"], factor * row[field]) for row in rows if _is_finite(row.get(field))]
    return [figures.Line(x=[x for x, _ in pairs], y=[y for _, y in pairs], look=look)] if pairs else []


def _mean_of(lines: Sequence[figures.Line], at: int) -> float:
    return math.fsum(line.y[at] for line in lines) / len(lines)


def losses(runs: Sequence[Run]) -> list[Figure]:
    """A figure a stage: those of the run with the most stages first, each in the order in which it ran."""
    stages = dict.fromkeys(stage for run in sorted(runs, key=lambda run: -len(run.stages)) for stage in run.stages)
    drawn = []
    for number, stage in enumerate(list(stages)[:_MOST_STAGES]):
        lines, name = [], stage
        for run in runs:
            found = _line((row for row in run.metrics if row["stage"] == stage), "loss", "ink")
            lines += found
            name = run.title(stage) if found else name
        if not lines:
            continue
        name, epochs = printable(name, 60), max(len(line.x) for line in lines)
        alt = f"{name}: the loss goes from {_mean_of(lines, 0):.3g} to {_mean_of(lines, -1):.3g} over {epochs} epochs"
        drawing = figures.curves(f"loss{number}", alt, lines, x_title="epoch", y_title="loss")
        drawn.append(Figure(name, drawing))
    return drawn


def measured(runs: Sequence[Run], rows: Sequence[Row]) -> list[Figure]:
    """For every row clean accuracy and attack success over epochs, and what the filter kept."""
    done = finished(runs)
    groups = [(tables.row_name(row, rows), [done[i] for i in row.members]) for row in rows[:SHOWN_ROWS]]
    groups += [(run_name(run), [run]) for run in unfinished(runs, rows)]
    drawn = []
    for number, (name, members) in enumerate(groups):
        drawn += _accuracies(name, number, members) + _kept(name, number, members)
    return drawn


def _last_stage(run: Run, *fields: str) -> list[Mapping[str, Any]]:
    """Rows of the last stage in which one of the fields was measured: curves of two stages do not join."""
    stages = [row["stage"] for row in run.metrics if any(_is_finite(row.get(field)) for field in fields)]
    return [row for row in run.metrics if stages and row["stage"] == stages[-1]]


def _measured_rows(run: Run) -> list[Mapping[str, Any]]:
    """Rows of the last stage in which accuracy was measured; none of a method that changes images at test time, since
    between epochs the model is measured without that."""
    return [] if run.changes_input else _last_stage(run, "clean_acc", "asr")


def measured_line(run: Run, field: str) -> list[figures.Line]:
    """A share over the epochs of the last stage in which accuracy was measured, in percent; empty where it was not, or
    is not that of the method."""
    return _line(_measured_rows(run), field, "ink", 100)


def _accuracies(name: str, number: int, members: Sequence[Run]) -> list[Figure]:
    lines: dict[str, list[figures.Line]] = {"clean accuracy": [], "attack success": []}
    for run in members:
        rows = _measured_rows(run)
        lines["clean accuracy"] += _line(rows, "clean_acc", "clean", 100)
        lines["attack success"] += _line(rows, "asr", "poisoned", 100)
    found = {what: its for what, its in lines.items() if its}
    if not found:
        return []
    alt = " and ".join(f"{what} ends at {percent(_mean_of(its, -1) / 100)}" for what, its in found.items())
    every = [line for its in found.values() for line in its]
    drawing = figures.curves(f"acc{number}", f"{name}: {alt}", every, x_title="epoch", y_title="%", percent=True)
    return [Figure(name, drawing)]


def _kept(name: str, number: int, members: Sequence[Run]) -> list[Figure]:
    lines = []
    for run in members:
        rows = [
            {"epoch": row["epoch"], "share": row["kept_poisoned"] / row["poisoned"]}
            for row in _last_stage(run, "kept_poisoned")
            if _is_finite(row.get("kept_poisoned")) and _is_finite(row.get("poisoned")) and row["poisoned"]
        ]
        lines += _line(rows, "share", "poisoned", 100)
    if not lines:
        return []
    alt = f"{name}: in the last split the filter keeps {percent(_mean_of(lines, -1) / 100)} of the poisoned images"
    drawing = figures.curves(f"kept{number}", alt, lines, x_title="epoch", y_title="% of poisoned kept", percent=True)
    return [Figure(f"{name}: poisoned images that the filter keeps", drawing)]
