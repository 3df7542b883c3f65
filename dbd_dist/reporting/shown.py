"""Which runs the page shows in detail, and what is known about their data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dbd_dist.reporting import tables
from dbd_dist.reporting.data import Data, find_data
from dbd_dist.reporting.runs import Run, load_run
from dbd_dist.reporting.tables import Row

SHOWN_ROWS = 6
"""Rows of the table that get histograms and suspects of their own; a sweep has hundreds."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A run that is shown in detail: the first of its row."""

    run: Run
    row: Row | None
    """None while there is no result."""
    name: str
    """For headings."""
    data: Data | str
    """The data set, or why it cannot be had."""

    @property
    def ranks(self) -> bool:
        """Is there, or should there be, a ranking of the samples?"""
        return self.run.defends or self.run.split is not None

    @property
    def poisoned(self) -> np.ndarray | None:
        """bool (n,) over the training images; None where that is not known."""
        return None if isinstance(self.data, str) or self.data.truth is None else self.data.truth.poisoned

    @property
    def not_apart(self) -> str:
        """Why clean and poisoned samples are not shown separately; empty where they are."""
        if isinstance(self.data, str):
            return f"Clean and poisoned images are not shown separately: {self.data}."
        if self.data.truth is None:
            return "Clean and poisoned images are not shown separately: the data set came without truth."
        return "" if self.data.truth.poisoned.any() else "The data carries no attack: no image is poisoned."


def run_name(run: Run, row: Row | None = None) -> str:
    """ "DBD (split.keep=0.4), seed 0"."""
    variant = f" ({row.variant})" if row is not None and row.variant else ""
    seed = "" if run.seed is None else f", seed {run.seed}"
    return f"{run.title()}{variant}{seed}"


def finished(runs: Sequence[Run]) -> list[Run]:
    """Those with a result, in the order in which `Row.members` counts them."""
    return [run for run in runs if run.result is not None]


def unfinished(runs: Sequence[Run], rows: Sequence[Row]) -> list[Run]:
    """Those without, as many as there is room for beside the rows."""
    return [run for run in runs if run.result is None][: max(SHOWN_ROWS - len(rows), 0)]


def choose(runs: Sequence[Run], rows: Sequence[Row]) -> list[Shown]:
    """One run a row, with its arrays and its data set; unfinished ones where there is room.

    Raises:
        UserError: a file of a run or of its data set is damaged.
    """
    done = finished(runs)
    chosen: list[tuple[Run, Row | None]] = []
    for row in rows[:SHOWN_ROWS]:
        members = [done[i] for i in row.members]
        chosen.append((min(members, key=lambda run: (run.seed is None, run.seed or 0)), row))
    chosen += [(run, None) for run in unfinished(runs, rows)]
    several = len(tables.grouped(rows)) > 1
    shown = []
    for run, row in chosen:
        loaded = load_run(run.folder)
        name = run_name(loaded, row)
        if row is None:
            name += f" ({loaded.state})"
        elif several:
            name = f"{tables.group_title(row)} · {name}"
        shown.append(Shown(run=loaded, row=row, name=name, data=find_data(loaded)))
    return shown


def stand_ins(among: Sequence[Shown]) -> str:
    """Says that one seed stands for several; empty where none does."""
    parts = {
        f"{one.run.title()}: seed {one.run.seed} of {len(one.row.results)} runs"
        for one in among
        if one.row is not None and len(one.row.results) > 1
    }
    return f"One run stands for its row ({'; '.join(sorted(parts))})." if parts else ""
