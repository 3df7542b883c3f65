"""Parquet tables of one row a sample: split, index, and the columns given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.io import limits


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


def read_table(path: Path, columns: Mapping[str, str], most: int | None = None) -> dict[str, dict[str, Any]]:
    """Read what `write_table` wrote.

    Args:
        path: of the file.
        columns: names and Arrow types.
        most: rows that there may be; without it `limits.TABLE_ROWS`.

    Returns:
        By split, by column: arrays (n,), in index order; strings as object arrays.

    Raises:
        UserError: missing or unreadable file, more rows than that, missing or mistyped columns, nulls, indices that
            are not 0 to n - 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    hint = "prepare the data set again"
    try:
        limits.refuse_pipes(path)
        file = pq.ParquetFile(path)
        rows, schema = file.metadata.num_rows, file.schema_arrow
        names = schema.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"unreadable table ({error})", where=path, hint=hint) from error
    wanted = {"split": "string", "index": "int64", **columns}
    for name, kind in wanted.items():
        if names.count(name) != 1 or str(schema.field(name).type) != kind:
            raise UserError(f"no column {name!r} of type {kind}", where=path, hint=hint)
    most = limits.TABLE_ROWS if most is None else most
    if rows > most:
        raise UserError(f"the table has {rows:,} rows", where=path, expected=f"at most {most:,}", hint=hint)
    try:
        table = file.read(columns=list(wanted))
        table.validate(full=True)  # damaged strings read well and fail when they are used
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"unreadable table ({error})", where=path, hint=hint) from error
    for name in wanted:
        if table.column(name).null_count:
            raise UserError(f"column {name!r} holds nulls", where=path, hint=hint)
    split = table.column("split").to_numpy(zero_copy_only=False)
    index = table.column("index").to_numpy()
    result: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(split):
        rows = np.flatnonzero(split == name)
        rows = rows[np.argsort(index[rows], kind="stable")]
        if (index[rows] != np.arange(len(rows))).any():
            raise UserError(f"the indices of {name} are not 0 to {len(rows) - 1}", where=path, hint=hint)
        result[name] = {c: table.column(c).to_numpy(zero_copy_only=False)[rows] for c in columns}
    return result
