"""Parquet files of images, in the layouts of Hugging Face."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.classes import difference
from data_prep.sources.columns import IMAGE, LABEL
from data_prep.sources.labels import read_labels
from data_prep.sources.pictures import Found, PictureSource
from data_prep.sources.shard import Shard
from data_prep.sources.source import OpenSource, folder_name, storable
from data_prep.sources.split import Encoded
from data_prep.sources.split_names import split_of


@dataclass(frozen=True, kw_only=True)
class Parquet(PictureSource):
    """A folder of Parquet files in the Hugging Face image layout.

    train.parquet, train-*.parquet or train/*.parquet, and test, validation, valid or val likewise, in ROOT, ROOT/data
    or another folder in ROOT. Class names come from the schema or the labels; without them classes are called by
    their numbers.
    """

    name: ClassVar[str] = "parquet"

    root: Path
    """The folder of the files."""
    image_px: int | None = None
    """Side of the squares that images are made; without it images stay as they are, all of one size."""
    image_column: str = IMAGE
    """Column of the images: a struct with `bytes` or `path`, the bytes themselves, or paths relative to the file. If
    none is called image, the one that holds images."""
    label_column: str = LABEL
    """Column of the labels: integers, names or booleans. If none is called label, the one that holds classes."""

    def __post_init__(self):
        super().__post_init__()
        self.check_px(self.image_px)

    def find(self) -> OpenSource:
        if not self.root.is_dir():
            raise UserError("no such folder", where=self.root, expected="a folder with train.parquet and test.parquet")
        files = parquet_files(self.root)
        if not files:
            raise UserError("no train images", where=self.root, expected="train.parquet or train-*.parquet")
        tables = ShardedTables(files, self.root, self.image_column, self.label_column)
        return self.assemble(tables.splits(), self.root, self.root, self.geometry(self.image_px))

    @property
    def stem(self) -> str:
        name = folder_name(self.root)
        return name if self.image_px is None else f"{name}-{self.image_px}px"


def parquet_files(root: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split: of ROOT, else of ROOT/data, else of another folder in ROOT.

    A file belongs to the split that its name begins with, or its folder's; files of no split are one without a name.

    Raises:
        UserError: several folders have training images; a file and shards of it are there.
    """
    found: dict[Path, dict[str, list[Path]]] = {}
    paths = {path: None for pattern in ("*", "*/*", "*/*/*") for path in sorted(root.glob(f"{pattern}.parquet"))}
    for path in paths:
        if any(part.startswith((".", "__")) for part in path.relative_to(root).parts):
            continue
        folder, split = path.parent, split_of(path.stem) or _sharded(path.stem)
        if folder != root and split_of(folder.name) is not None:
            folder, split = folder.parent, split or split_of(folder.name)
        found.setdefault(folder, {}).setdefault(split or "", []).append(path)
    chosen = next((folder for folder in (root, root / "data") if folder in found), None)
    if chosen is None and len(found) > 1:
        shown = ", ".join(storable(folder.relative_to(root)) for folder in list(found)[:10])
        raise UserError(f"several data sets: {shown}", where=root, hint="name the folder of one of them")
    files = found.get(chosen or next(iter(found), root), {})
    for split, of_split in files.items():
        whole = [path for path in of_split if path.stem.lower() == split]
        if whole and len(of_split) > 1:
            raise UserError(
                f"{whole[0].name} and shards of it are there", where=whole[0].parent, hint="keep one of them"
            )
    return files if len(files) == 1 else {split: paths for split, paths in files.items() if split}


def _sharded(stem: str) -> str | None:
    """What comes before the numbers of a shard: "extra" of extra-00000-of-00002; None without numbers."""
    found = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?", stem)
    return found[1] if found else None


class ShardedTables:
    """The splits of Parquet files: a split is one table in as many files as there are.

    Args:
        files: by split.
        root: of all of them; origins are relative to it.
        image, label: see `Shard`.
        names: class names by column, where somebody else than the files knows them.
    """

    def __init__(
        self,
        files: Mapping[str, Sequence[Path]],
        root: Path,
        image: str,
        label: str,
        names: Mapping[str, Sequence[str]] | None = None,
    ):
        self._root, self._files, self._asked, self._given = root, files, (image, label), names
        self._names: Sequence[str] | None = None

    def splits(self) -> dict[str, Callable[[], Found]]:
        """A reader of each split by its name, see `PictureSource.assemble`."""
        return {split: lambda paths=paths: self._found(paths) for split, paths in self._files.items()}

    def _found(self, paths: Sequence[Path]) -> Found:
        shards = [Shard(path, *self._asked, root=self._root, names=self._given) for path in paths]
        for shard in shards:
            if self._names is not None and shard.class_names is not None and self._names != shard.class_names:
                raise UserError(
                    f"class names differ from those before: {difference(self._names, shard.class_names)}",
                    where=shard.path,
                    expected="the same classes in every file",
                )
            self._names = self._names or shard.class_names
        where = paths[0] if len(paths) == 1 else paths[0].parent
        labels = read_labels(_one_column([shard.labels() for shard in shards], where), self._names, where=where)
        starts = np.cumsum([0, *(shard.rows for shard in shards)])

        def fetch(positions: np.ndarray) -> Iterator[Encoded]:
            for start, shard in zip(starts, shards):
                yield from shard.images(positions[(positions >= start) & (positions < start + shard.rows)] - start)

        def locate(i: int) -> str:
            shard = bisect.bisect_right(starts, i) - 1
            return f"{storable(shards[shard].path.relative_to(self._root))}#{i - starts[shard]}"

        return Found(labels, fetch, locate, where, tuple(shard.note for shard in shards if shard.note))


def _one_column(columns: list[Any], where: Path) -> Any:
    """The label columns of all shards as one."""
    import pyarrow as pa

    if any(column.type != columns[0].type for column in columns):
        columns = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in columns]
        try:
            tables = [pa.table({"label": column}) for column in columns]
            return pa.concat_tables(tables, promote_options="permissive").column(0)
        except pa.ArrowException as error:
            kinds = ", ".join(sorted({str(column.type) for column in columns}))
            raise UserError(f"labels of several kinds: {kinds}", where=where, expected="one kind") from error
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)
