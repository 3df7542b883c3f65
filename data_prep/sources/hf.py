"""Data sets in any layout that Hugging Face's `datasets` library reads, from a folder or from the Hub."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.io import limits
from data_prep.sources.columns import IMAGE, LABEL, find_columns
from data_prep.sources.labels import read_labels
from data_prep.sources.parquet import ShardedTables
from data_prep.sources.pictures import Found, PictureSource
from data_prep.sources.shard import encoded_of
from data_prep.sources.source import OpenSource, folder_name, storable
from data_prep.sources.split import Encoded
from data_prep.sources.split_names import split_of, training

_KINDS = ("parquet", "imagefolder", "csv", "json", "webdataset", "arrow")
"""The library's readers that are used: of images, and none that runs or unpickles what it reads."""


@dataclass(frozen=True, kw_only=True)
class HuggingFace(PictureSource):
    """A folder in any layout of Hugging Face, or a data set on the Hub, through the `datasets` library.

    Parquet, pictures in folders with or without metadata.csv, CSV or JSON with paths, WebDataset. Parquet files of a
    folder are read where they are, and the network is not used; what is copied for other layouts goes to a temporary
    folder. Data sets of the Hub stay in Hugging Face's cache (HF_HOME).
    """

    name: ClassVar[str] = "hf"

    path: str
    """A folder, or the name of a data set on the Hub (OWNER/NAME); may be written without the flag."""
    subset: str | None = None
    """Which of several data sets (configurations) of that name."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the Hub; without it the newest."""
    image_px: int | None = None
    """Side of the squares that images are made; without it images stay as they are, all of one size."""
    image_column: str = IMAGE
    """Column of the images. If none is called image, the one that holds images."""
    label_column: str = LABEL
    """Column of the labels: integers, names or booleans. If none is called label, the one that holds classes."""

    def __post_init__(self):
        super().__post_init__()
        self.check_px(self.image_px)
        if not self.path:
            raise UserError("the path is empty", where="path", expected="a folder, or a name on the Hub")

    @property
    def _folder(self) -> Path | None:
        """The folder; None where the name is one of the Hub."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    def find(self) -> OpenSource:
        folder = self._folder
        if folder is None and not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", self.path, re.ASCII):
            raise UserError("no such folder", where=self.path, expected="a folder, or a name on the Hub")
        with _library(offline=folder is not None, what=self.path) as datasets:
            where, cache = (folder, _Scratch()) if folder is not None else (self.path, None)
            lists = {} if folder is None else _spreadsheets(folder)
            builder = datasets.load_dataset_builder(
                "csv" if lists else os.path.abspath(folder) if folder is not None else self.path,
                data_files=lists or None,
                name=self.subset,
                revision=None if folder is not None else self.revision,
                cache_dir=cache.path if cache is not None else None,
            )
            kind = type(builder).__module__.split(".")[-1]
            if kind not in _KINDS:
                raise UserError(f"a data set of kind {kind}", where=where, expected=", ".join(_KINDS))
            files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
            if folder is not None:
                _check_inside(files, folder)
            if folder is not None and kind == "parquet":
                features = builder.info.features or {}
                names = {n: feature.names for n, feature in features.items() if hasattr(feature, "names")}
                paths = {split: [Path(path) for path in listed] for split, listed in files.items()}
                root = Path(os.path.realpath(folder))
                splits = ShardedTables(paths, root, self.image_column, self.label_column, names).splits()
            else:
                builder.download_and_prepare()
                splits = {
                    str(split): self._reader(table, files.get(str(split), []), folder, cache)
                    for split, table in builder.as_dataset().items()
                }
        return self.assemble(splits, folder, where, self.geometry(self.image_px))

    def _reader(
        self, table: Any, files: Sequence[str], folder: Path | None, cache: _Scratch | None
    ) -> Callable[[], Found]:
        """A reader of one split in the library's cache, which stays as long as the reader does."""
        where = folder if folder is not None else self.path
        base = Path(files[0]).parent if files and folder is not None else Path(".")
        root = os.path.realpath(folder) if folder is not None else os.path.realpath(os.path.expanduser("~"))

        def found() -> Found:
            if len(table) > limits.TABLE_ROWS:
                raise UserError(f"{len(table):,} rows", where=where, expected=f"at most {limits.TABLE_ROWS:,}")
            arrow, features = table.data.table, table.features
            described = {name: {"_type": type(feature).__name__} for name, feature in features.items()}
            image, label = find_columns(arrow.schema, described, self.image_column, self.label_column, where=where)
            names = getattr(features[label], "names", None)
            labels = read_labels(arrow.column(label), names, where=where)
            images = arrow.column(image)

            def fetch(positions: np.ndarray) -> Iterator[Encoded]:
                assert cache is None or os.path.isdir(cache.path)
                for i in positions:
                    yield encoded_of(images[int(i)].as_py(), base, root)

            def locate(i: int) -> str:
                value = images[i].as_py()
                path = value.get("path") if isinstance(value, dict) else value
                inside = isinstance(path, str) and folder is not None and path.startswith(root + os.sep)
                return storable(os.path.relpath(str(path), root)) if inside else f"{table.split}#{i}"

            found_by_type = {image, label} != {self.image_column, self.label_column}
            note = (f"columns found by type: {image} (images), {label} (labels)",) if found_by_type else ()
            return Found(labels, fetch, locate, where, note)

        return found

    def describe(self) -> dict[str, Any]:
        folder = self._folder
        return super().describe() | {"path": self.path if folder is None else storable(os.path.realpath(folder))}

    @property
    def stem(self) -> str:
        name = self.path.rpartition("/")[2] if self._folder is None else folder_name(self._folder)
        name = name if self.subset is None else f"{name}-{self.subset}"
        return name if self.image_px is None else f"{name}-{self.image_px}px"


class _Scratch:
    """A temporary folder that goes when nobody has it any more, at the latest when Python ends."""

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="dbd-hf-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _spreadsheets(folder: Path) -> dict[str, str]:
    """CSV files called by their split, by split, where the folder has no card: beside the pictures that they name the
    library would not see them."""
    if (folder / "README.md").exists():
        return {}
    found = {split: str(path) for path in sorted(folder.glob("*.csv")) if (split := split_of(path.stem)) is not None}
    return found if training(found) else {}


def _check_inside(files: Mapping[str, Sequence[str]], folder: Path) -> None:
    """A card may name any file as its data.

    Raises:
        UserError: one outside the folder.
    """
    root = os.path.realpath(folder)
    for path in (path for paths in files.values() for path in paths):
        if "://" in path or os.path.commonpath([root, os.path.realpath(os.path.join(root, path))]) != root:
            raise UserError(f"its card names a file outside the folder: {path!r}", where=folder)


@contextlib.contextmanager
def _library(*, offline: bool, what: str) -> Iterator[Any]:
    """The `datasets` library, quiet; whatever it raises becomes a UserError."""
    try:
        import datasets
        import huggingface_hub
        from datasets import config as settings
    except ImportError as error:
        raise UserError(
            "the datasets library is not installed", where="hf", hint="pip install 'dbd-dist[hf]'"
        ) from error
    switches = [(settings, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in switches]
    bars, loud = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    try:
        if offline:  # read when they are used: a folder needs no network, and gets none
            for module, name in switches:
                setattr(module, name, True)
            datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        yield datasets
    except UserError:
        raise
    except Exception as error:  # a library of many formats raises whatever came up
        raise _said(error, offline=offline, what=what) from error
    finally:
        for (module, name), value in zip(switches, before):
            setattr(module, name, value)
        datasets.logging.set_verbosity(loud)
        if not bars:
            datasets.enable_progress_bars()


def _said(error: Exception, *, offline: bool, what: str) -> UserError:
    """An error of the library as one for users."""
    kind, reason = type(error).__name__, " ".join(str(error.__cause__ or error).split())[:300]
    if not offline and (kind == "DatasetNotFoundError" or isinstance(error, FileNotFoundError)):
        return UserError("neither a folder nor a data set on the Hub that may be read", where=what)
    if not offline and isinstance(error, ConnectionError):
        return UserError(
            "no such folder, and the Hub cannot be reached", where=what,
            hint="give a folder, or call again where there is a network",
        )  # fmt: skip
    if kind in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return UserError(
            "no data set in this folder", where=what, expected="Parquet, CSV, JSON, WebDataset or pictures"
        )
    return UserError(f"the datasets library cannot read it ({reason})", where=what)
