"""Where images and labels come from: each source is a frozen config that opens to a training and a test
split."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from data_prep.errors import UserError
from data_prep.images import Geometry, decode_image
from data_prep.io import limits
from data_prep.io.json import parse_json

Encoded = bytes | Path | np.ndarray | None
"""One image as its source holds it: an image file's bytes, a path, uint8 (H, W, 3), or nothing."""

OnBadImage = Literal["fail", "skip"]


class Split:
    """Labelled images in a fixed order, decoded only when asked for.

    Args:
        labels: int64 (n,).
        fetch: (sorted int64 (m,) positions) -> those images, encoded, one after the other.
        locate: position -> where that image came from.
        folder: put before origins in errors.
        geometry: resize and crop of every image.
    """

    def __init__(
        self,
        labels: np.ndarray,
        *,
        fetch: Callable[[np.ndarray], Iterator[Encoded]],
        locate: Callable[[int], str],
        folder: Path | None = None,
        geometry: Geometry | None = None,
        chosen: np.ndarray | None = None,
    ):
        self._all_labels, self._fetch, self._locate = labels, fetch, locate
        self._folder, self._geometry = folder, geometry
        self._chosen = np.arange(len(labels)) if chosen is None else chosen
        self.labels = labels[self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def origin(self, i: int) -> str:
        """Where image i came from, in its owner's terms: file, or file and row, relative to the source's
        folder."""
        return self._locate(int(self._chosen[i]))

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 (H, W, 3).

        Raises:
            UserError: it cannot be decoded.
        """
        (encoded,) = self._fetch(self._chosen[i : i + 1])
        return self.decode(encoded, i)

    def stream(self) -> Iterator[Encoded]:
        """All images in order, encoded, without holding more than a few of them."""
        return self._fetch(self._chosen)

    def decode(self, encoded: Encoded, i: int) -> np.ndarray:
        """Image i from what `stream` gave for it, uint8 (H, W, 3); safe on any thread.

        Raises:
            UserError: it cannot be decoded.
        """
        if isinstance(encoded, np.ndarray):
            return encoded
        origin = self.origin(i)
        where = origin if self._folder is None else str(self._folder / origin)
        if encoded is None:
            raise UserError("there is no image, its bytes are null", where=where, expected="the bytes of an image file")
        return decode_image(encoded, where=where, geometry=self._geometry)

    def take(self, positions: np.ndarray) -> Split:
        """The split of these images only; positions sorted int (m,) or bool (n,)."""
        return Split(
            self._all_labels,
            fetch=self._fetch,
            locate=self._locate,
            folder=self._folder,
            geometry=self._geometry,
            chosen=self._chosen[positions],
        )


@dataclass(frozen=True)
class OpenSource:
    """An opened source."""

    class_names: tuple[str, ...]
    train: Split
    test: Split


@dataclass(frozen=True, kw_only=True)
class Source:
    """What all sources share."""

    kind: ClassVar[str]

    train_per_class: int | None = None
    """Keep this many training images a class, drawn at random; without it all."""
    test_per_class: int | None = None
    """Keep this many test images a class, drawn at random; without it all."""
    subset_seed: int = 0
    """Seed of that draw."""
    on_bad_image: OnBadImage = "fail"
    """What to do about an image that cannot be read: stop, or leave it out and list it in the manifest. To
    leave images out
    every image is decoded once more beforehand, since the number of poisoned ones is exact."""

    def __post_init__(self):
        for name in ("train_per_class", "test_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{value} images a class", where=name, expected="1 or more")
        if self.subset_seed < 0:
            raise UserError(f"seed {self.subset_seed} is negative", where="subset_seed", expected="0 or more")

    def open(self) -> OpenSource:
        """Find the images and read the labels, without decoding images.

        Raises:
            UserError: nothing there, or not as this source needs it.
        """
        raise AssertionError(f"{type(self).__name__} holds no images")

    @property
    def slug(self) -> str:
        """Names the source in a data set's folder name."""
        parts = [self._stem()]
        if self.train_per_class is not None:
            parts.append(f"{self.train_per_class}pc")
        return "-".join(parts)

    def _stem(self) -> str:
        return self.kind

    def describe(self) -> dict[str, Any]:
        """The config as JSON values; folders are absolute, so that equal names in different places differ."""
        described: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):
            value = getattr(self, field.name)
            described[field.name] = _storable(os.path.realpath(value)) if isinstance(value, Path) else value
        return described

    def _finish(self, class_names: Sequence[str], train: Split, test: Split, *, where: Path | None) -> OpenSource:
        names = tuple(class_names)
        check_classes(names, train.labels, test.labels, where=where)
        if self.train_per_class is not None:
            rng = np.random.default_rng([self.subset_seed, 0])
            train = train.take(balanced_subset(train.labels, self.train_per_class, names, rng, where="train_per_class"))
        if self.test_per_class is not None:
            rng = np.random.default_rng([self.subset_seed, 1])
            test = test.take(balanced_subset(test.labels, self.test_per_class, names, rng, where="test_per_class"))
        return OpenSource(names, train, test)


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 scans of handwritten digits that come with scikit-learn: 8 x 8 px, 10 classes, no download.

    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Enlarged (bilinear) and made
    RGB. The split into training and test images is stratified and always the same.
    """

    kind: ClassVar[str] = "digits"

    image_px: int = 16
    """Side of the images, 8 to 512."""
    test_fraction: float = 0.2
    """Share of test images, in every class."""

    def __post_init__(self):
        super().__post_init__()
        if not 8 <= self.image_px <= 512:  # all of them are held in memory
            raise UserError(f"images of {self.image_px} px", where="image_px", expected="8 to 512")
        if not 0 < self.test_fraction < 1:
            raise UserError(
                f"test fraction {self.test_fraction} is out of range",
                where="test_fraction",
                expected="above 0 and below 1",
            )

    def open(self) -> OpenSource:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        scans = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # grey levels 0 to 16
        labels = bunch.target.astype(np.int64)
        images = np.empty((len(scans), self.image_px, self.image_px, 3), dtype=np.uint8)
        for image, scan in zip(images, scans):
            size = (self.image_px, self.image_px)
            image[:] = np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR))[:, :, None]

        rng = np.random.default_rng(1998)  # not the poison's seed: the clean images stay the same under it
        is_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            members = rng.permutation(np.flatnonzero(labels == label))
            is_test[members[: max(1, round(self.test_fraction * len(members)))]] = True
        everything = in_memory(images, labels, locate=lambda i: f"sklearn load_digits #{i}")
        return self._finish(
            [str(i) for i in range(10)], everything.take(~is_test), everything.take(is_test), where=None
        )

    def _stem(self) -> str:
        return self.kind if self.image_px == 16 else f"{self.kind}-{self.image_px}px"


@dataclass(frozen=True, kw_only=True)
class Cifar10(Source):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32 x 32 px, 10 classes, from its own site."""

    kind: ClassVar[str] = "cifar10"

    root: Path = Path("data/cifar10")
    """Folder of the downloaded files."""
    download: bool = True
    """Download what is missing (170 MB)."""

    def open(self) -> OpenSource:
        from torchvision.datasets import CIFAR10

        try:
            train, test = (CIFAR10(str(self.root), train=part, download=self.download) for part in (True, False))
        except Exception as error:  # network, disk, checksum: torchvision raises whatever came up
            raise UserError(
                f"CIFAR-10 is not there and could not be downloaded ({error})",
                where=self.root,
                hint="download cifar-10-python.tar.gz into that folder, or use another source",
            ) from error

        def locate_train(i: int) -> str:
            return f"data_batch_{i // 10_000 + 1}#{i % 10_000}"

        return self._finish(
            train.classes,
            in_memory(train.data, np.array(train.targets, dtype=np.int64), locate=locate_train),
            in_memory(test.data, np.array(test.targets, dtype=np.int64), locate=lambda i: f"test_batch#{i}"),
            where=self.root,
        )


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """A folder of image files: ROOT/train/CLASS/*.jpg or *.png, and ROOT/test or ROOT/val likewise."""

    kind: ClassVar[str] = "imagefolder"

    root: Path
    """The folder that holds train and test (or val)."""
    image_px: int = 224
    """Side of the central square that is kept."""
    resize_px: int = 256
    """The shorter side is resized to this first."""
    follow_links: bool = False
    """Follow symbolic links that lead out of ROOT. Refused otherwise: in a folder from strangers, a link would copy a
    file of yours into the data set."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.image_px <= self.resize_px:
            raise UserError(
                f"a crop of {self.image_px} px does not fit a shorter side of {self.resize_px} px",
                where="image_px, resize_px",
                expected="1 <= image_px <= resize_px",
            )
        if self.resize_px > limits.IMAGE_PX:
            raise UserError(f"images of {self.resize_px} px", where="resize_px", expected=f"at most {limits.IMAGE_PX}")

    def open(self) -> OpenSource:
        root = self.root
        train_folder = root / "train"
        test_folders = [f for f in (root / "test", root / "val") if f.is_dir()]
        if not train_folder.is_dir() or not test_folders:
            raise UserError(
                "not an image folder", where=root, expected="ROOT/train/CLASS/*.jpg and ROOT/test or ROOT/val"
            )
        if len(test_folders) > 1:
            raise UserError("both test and val are there", where=root, hint="keep one of them in this folder")
        names = _class_folders(train_folder)
        test_names = _class_folders(test_folders[0])
        if names != test_names:
            raise UserError(
                f"classes differ from those in train: {_difference(names, test_names)}",
                where=test_folders[0],
                expected="the same class folders in both",
            )
        geometry = Geometry(resize_px=self.resize_px, crop_px=self.image_px)
        train, test = (self._split(folder, names, geometry) for folder in (train_folder, test_folders[0]))
        return self._finish(names, train, test, where=root)

    def _split(self, folder: Path, names: Sequence[str], geometry: Geometry) -> Split:
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = self._inside(folder / name)
            if not found:
                raise UserError("the class folder is empty", where=folder / name, expected="at least one image a class")
            paths += found
            labels += [label] * len(found)

        def fetch(positions: np.ndarray) -> Iterator[Path]:
            return (paths[i] for i in positions)

        return Split(
            np.array(labels, dtype=np.int64),
            fetch=fetch,
            locate=lambda i: _storable(paths[i].relative_to(self.root)),
            folder=self.root,
            geometry=geometry,
        )

    def _inside(self, folder: Path) -> list[Path]:
        """The files of a class, in order; links out of the root are refused unless they are to be followed."""
        root, found = os.path.realpath(self.root), []
        with os.scandir(folder) as entries:
            for entry in entries:
                path = folder / entry.name
                if _is_clutter(path):
                    continue
                found.append(path)
                if entry.is_symlink():
                    self._refuse_link(path, root)
        for link in (folder, folder.parent):
            if link.is_symlink():
                self._refuse_link(link, root)
        return sorted(found)

    def _refuse_link(self, path: Path, root: str) -> None:
        aim = os.path.realpath(path)
        if not self.follow_links and os.path.commonpath([root, aim]) != root:
            raise UserError(
                f"a link to {aim}, outside the image folder",
                where=path,
                expected="links to what is inside",
                hint="give follow_links where you made these links yourself",
            )

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        del described["follow_links"]  # says what is allowed, not what the data set is
        return described

    def _stem(self) -> str:
        return _folder_name(self.root)


@dataclass(frozen=True, kw_only=True)
class Parquet(Source):
    """A folder of Parquet files in the Hugging Face image layout.

    train.parquet or train-*.parquet, and test or validation likewise, in ROOT or ROOT/data. Class names come
    from the schema; without them classes are called 0 to K - 1.
    """

    kind: ClassVar[str] = "parquet"

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

    def open(self) -> OpenSource:
        if not self.root.is_dir():
            raise UserError("no such folder", where=self.root, expected="a folder with train.parquet and test.parquet")
        train_files = self._files("train")
        test_files = self._files("test", "validation")
        geometry = Geometry(resize_px=self.image_px, crop_px=self.image_px)
        names: list[str] | None = None
        splits: list[Split] = []
        for files in (train_files, test_files):
            shards = [_ParquetShard(path, self.image_column, self.label_column) for path in files]
            for shard in shards:
                if names is not None and shard.class_names is not None and names != shard.class_names:
                    raise UserError(
                        f"class names differ from those before: {_difference(names, shard.class_names)}",
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
        return self._finish(names, splits[0], splits[1], where=self.root)

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

    def _split(self, shards: list[_ParquetShard], geometry: Geometry) -> Split:
        starts = np.cumsum([0, *(len(shard.labels) for shard in shards)])

        def shard_of(i: int) -> int:
            return bisect.bisect_right(starts, i) - 1

        def fetch(positions: np.ndarray) -> Iterator[bytes | None]:
            for start, shard in zip(starts, shards):
                inside = positions[(positions >= start) & (positions < start + len(shard.labels))] - start
                yield from shard.images(inside)

        def locate(i: int) -> str:
            shard = shard_of(i)
            return f"{_storable(shards[shard].path.relative_to(self.root))}#{i - starts[shard]}"

        return Split(
            np.concatenate([shard.labels for shard in shards]),
            fetch=fetch,
            locate=locate,
            folder=self.root,
            geometry=geometry,
        )

    def _stem(self) -> str:
        name = _folder_name(self.root)
        return name if self.image_px is None else f"{name}-{self.image_px}px"


class _ParquetShard:
    """One Parquet file: labels read at once, images a few at a time."""

    def __init__(self, path: Path, image_column: str, label_column: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.image_column = path, image_column
        with _parquet_errors(path):
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
        with _parquet_errors(path):
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
        with _parquet_errors(self.path):
            # buffered and not read ahead: a file may be one row group of gigabytes
            file = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20)
        start = 0
        for group, length in enumerate(self._row_groups):
            wanted = rows[(rows >= start) & (rows < start + length)]
            if len(wanted):
                batches = file.iter_batches(batch_size=64, row_groups=[group], columns=[self.image_column])
                first = start
                while True:
                    with _parquet_errors(self.path):
                        batch = next(batches, None)
                    if batch is None:
                        break
                    for row in wanted[(wanted >= first) & (wanted < first + len(batch))]:
                        value = batch.column(0)[int(row) - first].as_py()
                        yield value.get("bytes") if isinstance(value, dict) else value
                    first += len(batch)
            start += length


def in_memory(images: np.ndarray, labels: np.ndarray, *, locate: Callable[[int], str]) -> Split:
    """A split of images that are decoded already: uint8 (n, H, W, 3) and int64 (n,)."""
    return Split(labels, fetch=lambda positions: (images[i] for i in positions), locate=locate)


def check_classes(
    class_names: Sequence[str], train_labels: np.ndarray, test_labels: np.ndarray, *, where: Path | None
) -> None:
    """Check labels against the class names.

    Raises:
        UserError: fewer than two classes, a name twice, a label outside the names, a class without an image
            in either split.
    """
    count = len(class_names)
    if count < 2:
        raise UserError(f"{count} class{'es' if count == 0 else ''} only", where=where, expected="two or more classes")
    doubles = sorted({name for name in class_names if list(class_names).count(name) > 1}) if count < 5000 else []
    if doubles:
        raise UserError(f"class name {doubles[0]!r} occurs twice", where=where, expected="a name a class")
    for split, labels in (("train", train_labels), ("test", test_labels)):
        outside = np.flatnonzero((labels < 0) | (labels >= count))
        if len(outside):
            raise UserError(
                f"{split} row {outside[0]}: label {labels[outside[0]]} is not a class",
                where=where,
                expected=f"0 to {count - 1}, as there are {count} class names",
            )
        empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0)
        if len(empty):
            shown = ", ".join(f"{i} ({class_names[i]})" for i in empty[:5])
            raise UserError(
                f"no {split} image of class {shown}{' and others' if len(empty) > 5 else ''}",
                where=where,
                expected="every class in both train and test",
            )


def balanced_subset(
    labels: np.ndarray, per_class: int, class_names: Sequence[str], rng: np.random.Generator, *, where: str
) -> np.ndarray:
    """Draw `per_class` samples of every class.

    Args:
        labels: int (n,).
        per_class: images to keep of each class.
        class_names: K names.
        rng: of this draw alone.
        where: the option that asked for it.

    Returns:
        Sorted int64 (K * per_class,) positions.

    Raises:
        UserError: a class has fewer.
    """
    kept = []
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise UserError(
                f"{per_class} images a class, but class {label} ({name}) has {len(members)}",
                where=where,
                expected=f"1 to {int(np.bincount(labels, minlength=len(class_names)).min())}",
            )
        kept.append(rng.choice(members, size=per_class, replace=False))
    return np.sort(np.concatenate(kept))


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        if _storable(name) != name:
            raise UserError("the class folder's name is not UTF-8", where=folder / name, hint="rename it")
    return names


def _folder_name(root: Path) -> str:
    return _storable(os.path.basename(os.path.realpath(root)))  # resolve() raises on links that lead in a circle


def _storable(path: str | Path) -> str:
    """A path as text for JSON and Parquet: bytes that are not UTF-8, as in old archives, are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _is_clutter(path: Path) -> bool:
    """What file managers leave behind; anything else that is no image is reported, not passed over."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")


def _difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    parts = []
    if missing:
        parts.append(f"missing {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}")
    if extra:
        parts.append(f"unknown {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}")
    return "; ".join(parts) or "another order"


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
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"unreadable Parquet file ({error})", where=path, expected="a whole Parquet file") from error


def probe_px(source: OpenSource, *, skip_bad: bool) -> int:
    """Side of the images, from the first training image that can be decoded.

    Raises:
        UserError: it is not square, or none can be decoded.
    """
    for i, encoded in enumerate(source.train.stream()):
        try:
            height, width = source.train.decode(encoded, i).shape[:2]
        except UserError:
            if skip_bad:
                continue
            raise
        if height != width:
            raise UserError(
                f"an image of {width} x {height} px is not square",
                where=source.train.origin(i),
                hint="give image_px, to resize and crop all images to squares",
            )
        return height
    raise UserError("not one training image can be read")
