"""Parquet files of images, in the layout of Hugging Face."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.images import Geometry
from data_prep.io import limits
from data_prep.io.json import parse_json
from data_prep.sources.classes import difference
from data_prep.sources.source import OpenSource, Source, folder_name, storable
from data_prep.sources.split import Split


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """A folder of Parquet files in the Hugging Face image layout.

    train.parquet or train-*.parquet, and test or validation likewise, in ROOT or ROOT/data. Class names come
    from the schema; without them classes are called 0 to K - 1.
    """

    name: ClassVar[str] = "parquet"

    root: Path
    """The folder of the files."""
    image_px: int | None = None
    """Resize the shorter side to this and keep the central square; without it images stay as they are, all of
    one size."""
    image_column: str = "image"
    """Column of the images: a struct with `bytes`, or the bytes themselves."""
    label_column: str = "label"
    """Column of the labels: integers from 0."""

    def __post_init__(self):
        super().__post_init__()
        if self.image_px is not None and not 1 <= self.image_px <= limits.IMAGE_PX:
            raise UserError(f"images of {self.image_px} px", where="image_px", expected=f"1 to {limits.IMAGE_PX}")

    def find(self) -> OpenSource:
        if not self.root.is_dir():
            raise UserError("no such folder", where=self.root, expected="a folder with train.parquet and test.parquet")
        train_files = self._files("train")
        test_files = self._files("test", "validation")
        geometry = Geometry(resize_px=self.image_px, crop_px=self.image_px)
        names: list[str] | None = None
        splits: list[Split] = []
        for files in (train_files, test_files):
            shards = [_Shard(path, self.image_column, self.label_column) for path in files]
            for shard in shards:
                if names is not None and shard.class_names is not None and names != shard.class_names:
                    raise UserError(
                        f"class names differ from those before: {difference(names, shard.class_names)}",
                        where=shard.path,
                        expected="the same classes in every file",
                    )
                names = names or shard.class_names
            splits.append(self._split(shards, geometry))
        if names is None:
            highest = max((int(split.labels.max()) for split in splits if len(split)), default=-1)
            if highest >= len(splits[0]):  # a damaged label must not ask for a name each up to it
                raise UserError(
                    f"label {highest}, but there are {len(splits[0])} training images for classes 0 to {highest}",
                    where=self.root,
                    expected="labels from 0 without gaps",
                )
            names = [str(i) for i in range(highest + 1)]
        return OpenSource(tuple(names), *splits)

    def _files(self, *stems: str) -> list[Path]:
        for folder in (self.root, self.root / "data"):
            found = {s: [*folder.glob(f"{s}.parquet"), *sorted(folder.glob(f"{s}-*.parquet"))] for s in stems}
            present = [s for s in stems if found[s]]
            if len(present) > 1:
                raise UserError(
                    f"both {' and '.join(present)} are there",
                    where=folder,
                    hint="keep one of them in this folder",
                )
            if present:
                files = found[present[0]]
                if len(files) > 1 and files[0].name == f"{present[0]}.parquet":
                    raise UserError(
                        f"{files[0].name} and shards of it are there", where=folder, hint="keep one of them"
                    )
                return files
        wanted = " or ".join(f"{s}.parquet or {s}-*.parquet" for s in stems)
        raise UserError(f"no {stems[0]} images", where=self.root, expected=wanted)

    def _split(self, shards: list[_Shard], geometry: Geometry) -> Split:
        starts = np.cumsum([0, *(len(shard.labels) for shard in shards)])

        def shard_of(i: int) -> int:
            return bisect.bisect_right(starts, i) - 1

        def fetch(positions: np.ndarray) -> Iterator[bytes | None]:
            for start, shard in zip(starts, shards):
                inside = positions[(positions >= start) & (positions < start + len(shard.labels))] - start
                yield from shard.images(inside)

        def locate(i: int) -> str:
            shard = shard_of(i)
            return f"{storable(shards[shard].path.relative_to(self.root))}#{i - starts[shard]}"

        return Split(
            np.concatenate([shard.labels for shard in shards]),
            fetch=fetch,
            locate=locate,
            folder=self.root,
            geometry=geometry,
        )

    @property
    def stem(self) -> str:
        name = folder_name(self.root)
        return name if self.image_px is None else f"{name}-{self.image_px}px"


class _Shard:
    """One Parquet file: labels read at once, images a few at a time."""

    def __init__(self, path: Path, image_column: str, label_column: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.image_column = path, image_column
        with _errors(path):
            limits.refuse_pipes(path)
            file = pq.ParquetFile(path)
            schema = file.schema_arrow
        if file.metadata.num_rows > limits.TABLE_ROWS:
            raise UserError(f"{file.metadata.num_rows:,} rows", where=path, expected=f"at most {limits.TABLE_ROWS:,}")
        for column, flag in ((image_column, "image_column"), (label_column, "label_column")):
            if schema.names.count(column) != 1:
                count = "more than one" if column in schema.names else "no"
                raise UserError(
                    f"{count} column {column!r}; the columns are {', '.join(schema.names)}",
                    where=path,
                    hint=f"name the right one with {flag}",
                )
        kind = schema.field(image_column).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(
                f"column {image_column!r} is {schema.field(image_column).type}",
                where=path,
                expected="struct<bytes: binary, path: string>, or binary",
            )
        if not pa.types.is_integer(schema.field(label_column).type):
            raise UserError(
                f"column {label_column!r} is {schema.field(label_column).type}",
                where=path,
                expected="integers from 0",
            )
        with _errors(path):
            labels = file.read(columns=[label_column]).column(label_column)
        if labels.null_count:
            row = int(np.flatnonzero(labels.is_null().to_numpy())[0])
            raise UserError(f"row {row}: the label is null", where=path, expected="integers from 0")
        self.labels: np.ndarray = labels.to_numpy().astype(np.int64)
        self.class_names = _class_names(schema.metadata, label_column, path)
        self._row_groups = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]

    def images(self, rows: np.ndarray) -> Iterator[bytes | None]:
        """The images' bytes for sorted rows, reading only the row groups that hold any."""
        import pyarrow.parquet as pq

        if not len(rows):
            return
        with _errors(self.path):
            # buffered and not read ahead: a file may be one row group of gigabytes
            file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        start = 0
        for group, length in enumerate(self._row_groups):
            wanted = rows[(rows >= start) & (rows < start + length)]
            if len(wanted):
                batches = file.iter_batches(batch_size=64, row_groups=[group], columns=[self.image_column])
                first = start
                while True:
                    with _errors(self.path):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    for row in wanted[(wanted >= first) & (wanted < first + len(batch))]:
                        value = batch.column(0)[int(row) - first].as_py()
                        yield value.get("bytes") if isinstance(value, dict) else value
                    first += len(batch)
            start += length


def _class_names(metadata: dict[bytes, bytes] | None, label_column: str, path: Path) -> list[str] | None:
    """The names in Hugging Face's schema metadata; None where the schema has none."""
    raw = (metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        feature = parse_json(raw)["info"]["features"][label_column]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the schema's 'huggingface' entry cannot be read ({error!r})", where=path) from error
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
def _errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"unreadable Parquet file ({error})", where=path, expected="a complete Parquet file") from error
