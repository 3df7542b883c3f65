"""One Parquet file of images: labels read at once, images a few at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.io import limits
from data_prep.io.json import parse_json
from data_prep.io.pages import pages
from data_prep.sources.columns import find_columns
from data_prep.sources.split import Encoded


class Shard:
    """One Parquet file of images.

    Args:
        path: of the file.
        image: name of the images' column, see `find_columns`.
        label: name of the labels' column.
        root: paths of images may not lead out of this folder.
        names: class names by column, where somebody else than the file knows them.

    Raises:
        UserError: not a Parquet file, too many rows, no such columns, or more memory than `limits` allow.
    """

    def __init__(
        self, path: Path, image: str, label: str, *, root: Path, names: Mapping[str, Sequence[str]] | None = None
    ):
        import pyarrow.parquet as pq

        self.path, self._root = path, os.path.realpath(root)
        with reading(path):
            limits.refuse_pipes(path)
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
        if file.metadata.num_rows > limits.TABLE_ROWS:
            raise UserError(f"{file.metadata.num_rows:,} rows", where=path, expected=f"at most {limits.TABLE_ROWS:,}")
        features = _features(schema.metadata, path)
        self.image, self.label = find_columns(schema, features, image, label, where=path)
        self.rows: int = file.metadata.num_rows
        others = [name for name, asked in ((self.image, image), (self.label, label)) if name != asked]
        self.note = f"columns found by type: {self.image} (images), {self.label} (labels)" if others else ""
        if features and self.label not in features:
            self.note = (
                f"the 'huggingface' entry of the schema says nothing of column {self.label}: no class names there"
            )
        self.class_names = (names or {}).get(self.label) or _class_names(features, self.label, path)
        self._row_groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        self._is_text = _is_text(schema.field(self.label).type)
        self._batch_rows = self._bounded(file.metadata)

    def labels(self) -> Any:
        """The column of labels, an Arrow ChunkedArray; text as a dictionary, so that a value is there once."""
        import pyarrow.parquet as pq

        with reading(self.path):
            file = pq.ParquetFile(self.path, read_dictionary=[self.label] if self._is_text else None)
            return file.read(columns=[self.label]).column(self.label)

    def images(self, rows: np.ndarray) -> Iterator[Encoded]:
        """The images of sorted rows, encoded, reading only the row groups that hold any."""
        import pyarrow.parquet as pq

        if not len(rows):
            return
        with reading(self.path):
            # buffered and not read ahead: a file may be one row group of gigabytes
            file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        start = 0
        for group, length in enumerate(self._row_groups):
            wanted = rows[(rows >= start) & (rows < start + length)]
            if len(wanted):
                batches = file.iter_batches(
                    batch_size=self._batch_rows[group], row_groups=[group], columns=[self.image]
                )
                first = start
                while True:
                    with reading(self.path):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    for row in wanted[(wanted >= first) & (wanted < first + len(batch))]:
                        yield encoded_of(batch.column(0)[int(row) - first].as_py(), self.path.parent, self._root)
                    first += len(batch)
            start += length

    def _bounded(self, metadata: Any) -> list[int]:
        """How many rows of each group may be decoded at a time: `limits.BATCH_BYTES` hold even where every row has the
        longest value that its pages can hold.

        Raises:
            UserError: a page, or the labels as a whole, take more than they may.
        """
        rows, labels = [], 0
        with reading(self.path), self.path.open("rb") as file:
            for group in range(metadata.num_row_groups):
                chunks = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
                largest = 1
                for chunk in chunks:
                    path, of = chunk.path_in_schema, (self.image, self.label)
                    column = next((name for name in of if path == name or path.startswith(f"{name}.")), None)
                    if column is None or not chunk.num_values:
                        continue
                    for page in pages(file, chunk):
                        most = limits.IMAGE_FILE_BYTES if page.is_dictionary else limits.PAGE_BYTES
                        if page.bytes > most:
                            raise UserError(
                                f"a page of {page.bytes >> 20:,} MiB in column {column!r}",
                                where=self.path,
                                expected=f"at most {most >> 20} MiB",
                            )
                        if column == self.image:
                            largest = max(largest, page.bytes)
                        else:
                            labels += page.bytes
                rows.append(max(1, min(64, limits.BATCH_BYTES // largest)))
        if labels > limits.PAGE_BYTES:
            most = f"at most {limits.PAGE_BYTES >> 20} MiB"
            raise UserError(f"labels of {labels >> 20:,} MiB", where=self.path, expected=most)
        return rows


def encoded_of(value: Any, folder: Path, root: str) -> Encoded:
    """One image of a table: bytes, a struct of bytes and path, a path, or a list of one.

    Args:
        value: as Arrow has it in Python.
        folder: which paths are relative to.
        root: which they must not lead out of.
    """
    if isinstance(value, list):
        if len(value) != 1:
            return UserError(f"{len(value)} images in one row", expected="one image a row")
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, str):
        return value
    path = Path(os.path.realpath(os.path.join(folder, value))) if "\0" not in value else None
    if path is None or os.path.commonpath([root, path]) != root:
        return UserError(
            f"there are no bytes of an image, and its path leads out of the folder: {value!r}",
            expected="the bytes of an image file, or a path to one below the folder",
        )
    return path


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _features(metadata: dict[bytes, bytes] | None, path: Path) -> dict[str, Any]:
    """The columns as Hugging Face describes them in the schema's metadata, by name; empty where it does not."""
    raw = (metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        content = parse_json(raw)
    except ValueError as error:
        raise UserError(f"the schema's 'huggingface' entry cannot be read ({error})", where=path) from error
    for key in ("info", "features"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _class_names(features: Mapping[str, Any], label: str, path: Path) -> list[str] | None:
    """The names of a column's classes; None where its description has none."""
    feature = features.get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("the class names in the schema's 'huggingface' entry are not strings", where=path)
    for name in names:
        if not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):  # cannot be written as UTF-8
            raise UserError(f"class name {name!r} is not Unicode", where=path, hint="rename the class")
    return names


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever Arrow raises about a file, as one UserError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise UserError(f"unreadable Parquet file ({error})", where=path, expected="a complete Parquet file") from error
