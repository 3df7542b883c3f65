"""Parquet tables of one row a sample: split, index, and the columns given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError


def write_table(path: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write columns of equal length a split, in index order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for split, columns in splits.items():
        count = len(next(iter(columns.values())))
        parts.append(
            pa.table(
                {
                    "split": pa.array([split] * count, pa.string()),
                    "index": np.arange(count, dtype=np.int64),
                    **{name: pa.array(values) for name, values in columns.items()},
                }
            )
        )
    pq.write_table(pa.concat_tables(parts), path)


def read_table(path: Path, columns: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read what `write_table` wrote.

    Args:
        path: of the file.
        columns: names and Arrow types.

    Returns:
        By split, by column: arrays (n,), in index order; strings as object arrays.

    Raises:
        UserError: missing or unreadable file, missing or mistyped columns, nulls, indices that are not 0 to n
            - 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fix = "prepare the data set again"
    try:
        table = pq.ParquetFile(path).read()
        table.validate(full=True)  # damaged strings read well and fail when they are used
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"unreadable table ({error})", where=path, fix=fix) from error
    for name, kind in {"split": "string", "index": "int64", **columns}.items():
        if name not in names or str(table.schema.field(name).type) != kind:
            raise UserError(f"no column {name!r} of type {kind}", where=path, fix=fix)
        if table.column(name).null_count:
            raise UserError(f"column {name!r} holds nulls", where=path, fix=fix)
    split = table.column("split").to_numpy(zero_copy_only=False)
    index = table.column("index").to_numpy()
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(split):
        rows = np.flatnonzero(split == name)
        rows = rows[np.argsort(index[rows], kind="stable")]
        if (index[rows] != np.arange(len(rows))).any():
            raise UserError(f"the indices of {name} are not 0 to {len(rows) - 1}", where=path, fix=fix)
        result[name] = {c: table.column(c).to_numpy(zero_copy_only=False)[rows] for c in columns}
    return result
