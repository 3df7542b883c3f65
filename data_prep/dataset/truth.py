"""Which samples are poisoned, and their true labels. Training code must not import this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.io.tables import read_table, write_table

FILE = "truth.parquet"


@dataclass(frozen=True)
class SplitTruth:
    """The truth about one split, in index order."""

    true_label: np.ndarray
    """int64 (n,)."""
    poisoned: np.ndarray
    """bool (n,): carries the trigger, for the attacker's label."""
    cover: np.ndarray
    """bool (n,): carries a trigger and kept its label."""


Truth = Mapping[str, SplitTruth]
"""By split: train, test, with an attack test_triggered, and holdout where there is one."""


def write_truth(folder: str | PathLike[str], truth: Truth) -> None:
    """Write the truth of all splits into a data set's folder."""
    columns = {
        name: {"true_label": t.true_label, "poisoned": t.poisoned, "cover": t.cover} for name, t in truth.items()
    }
    write_table(Path(folder) / FILE, columns)


def read_truth(folder: str | PathLike[str], most: int | None = None) -> Truth:
    """The truth of all splits.

    Args:
        folder: of the data set.
        most: samples that there may be, which bounds the memory that a hostile file can ask for.

    Raises:
        UserError: there is none, as in a data set of unknown origin, or the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise UserError("the data set holds no truth: nobody knows which of its images are poisoned", where=folder)
    table = read_table(path, {"true_label": "int64", "poisoned": "bool", "cover": "bool"}, most)
    return {
        name: SplitTruth(columns["true_label"], columns["poisoned"], columns["cover"])
        for name, columns in table.items()
    }
