"""Where each sample came from, and the label that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from data_prep.io.tables import read_table, write_table

FILE = "samples.parquet"


@dataclass(frozen=True)
class SplitSamples:
    """The samples of one split, in index order."""

    label: np.ndarray
    """int64 (n,): as given to the victim."""
    origin: list[str]
    """File, or file and row, in the terms of the images' owner."""


Samples = Mapping[str, SplitSamples]
"""By split: train, test, and holdout where there is one."""


def write_samples(folder: str | PathLike[str], samples: Samples) -> None:
    """Write the samples of all splits into a data set's folder."""
    columns = {name: {"label": s.label, "origin": s.origin} for name, s in samples.items()}
    write_table(Path(folder) / FILE, columns)


def read_samples(folder: str | PathLike[str], most: int | None = None) -> Samples:
    """The samples of all splits.

    Args:
        folder: of the data set.
        most: samples that there may be, which bounds the memory that a hostile file can ask for.

    Raises:
        UserError: missing or damaged file.
    """
    table = read_table(Path(folder) / FILE, {"label": "int64", "origin": "string"}, most)
    return {name: SplitSamples(columns["label"], list(columns["origin"])) for name, columns in table.items()}


def read_origins(folder: str | PathLike[str], split: str = "train") -> list[str]:
    """Where the samples of one split came from, in index order.

    Raises:
        UserError: missing or damaged file.
    """
    return read_samples(folder)[split].origin
