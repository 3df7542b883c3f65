"""The arrays that a run leaves, read and checked: split.parquet and features.npz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.io.limits import TABLE_ROWS, refuse_pipes

LARGEST = float(np.finfo(np.float32).max)
"""Training computes in float32: no figure of a run is larger."""


@dataclass(frozen=True)
class Split:
    """What the filter made of every training sample, in index order: arrays (n,)."""

    loss: np.ndarray
    """float64: SCE loss in the last split."""
    kept: np.ndarray
    """bool: its label was used."""
    first_loss: np.ndarray
    """float64: in the split right after the warm-up."""
    first_kept: np.ndarray
    """bool."""


@dataclass(frozen=True)
class Features:
    """Penultimate features of some training samples."""

    index: np.ndarray
    """int64 (n,): which samples."""
    features: np.ndarray
    """float32 (n, d)."""
    kind: str
    """"ssl" or "supervised": how the backbone was trained."""


_SPLIT = {"index": "integer", "loss": "floating", "kept": "boolean", "first_loss": "floating", "first_kept": "boolean"}
"""Columns of split.parquet, and the kind of type each has."""


def read_split(path: Path) -> Split:
    """split.parquet.

    Raises:
        UserError: damaged.
    """
    columns = _columns(path)
    index = columns.pop("index")
    order = np.argsort(index, kind="stable")
    if len(index) == 0 or not np.array_equal(index[order], np.arange(len(index))):
        raise UserError("damaged: the indices are not 0 to n - 1", where=path)
    for name in ("loss", "first_loss"):
        columns[name] = columns[name].astype(np.float64)
        if not (np.abs(columns[name]) <= LARGEST).all():
            raise UserError(f"damaged: column {name!r} holds losses that are not finite float32", where=path)
    return Split(**{name: values[order] for name, values in columns.items()})


def _columns(path: Path) -> dict[str, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        refuse_pipes(path)
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if file.metadata.num_rows > TABLE_ROWS:
            raise UserError(f"damaged: {file.metadata.num_rows:,} rows", where=path)
        for name, kind in _SPLIT.items():
            if schema.names.count(name) != 1 or not getattr(pa.types, f"is_{kind}")(schema.field(name).type):
                raise UserError(f"damaged: no column {name!r} of its type", where=path)
        table = file.read(columns=list(_SPLIT))
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"damaged: not a table ({error})", where=path) from error
    if nulls := [name for name in _SPLIT if table.column(name).null_count]:
        raise UserError(f"damaged: column {nulls[0]!r} holds nulls", where=path)
    return {name: table.column(name).to_numpy() for name in _SPLIT}


def read_features(path: Path) -> Features:
    """features.npz.

    Raises:
        UserError: damaged.
    """
    try:
        arrays = map_arrays(path, ("index", "features", "kind"))
    except (OSError, ValueError) as error:
        raise UserError(f"damaged: not the features of a run ({error})", where=path) from error
    index, features, kind = arrays["index"], arrays["features"], arrays["kind"]
    if not _fit(index, features) or kind.shape != () or kind.dtype.kind != "U":
        raise UserError(
            f"damaged: index {index.dtype} {index.shape} and features {features.dtype} {features.shape}",
            where=path,
            expected="index int (n,), no index twice, and features float (n, d)",
        )
    if not (np.abs(features) <= np.float32(LARGEST)).all():
        raise UserError("damaged: features that are not finite float32", where=path)
    return Features(index.astype(np.int64), features.astype(np.float32), str(kind))


def _fit(index: np.ndarray, features: np.ndarray) -> bool:
    return (
        index.ndim == 1
        and features.ndim == 2
        and len(index) == len(features) > 0
        and np.issubdtype(index.dtype, np.integer)
        and np.issubdtype(features.dtype, np.floating)
        and len(np.unique(index)) == len(index)
        and bool(index.min() >= 0)
    )
