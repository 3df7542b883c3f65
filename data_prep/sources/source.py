"""What every source is: a frozen config that opens to a training and a test split."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.classes import balanced_subset, check_classes
from data_prep.sources.split import Split

OnBadImage = Literal["fail", "skip"]


@dataclass(frozen=True)
class OpenSource:
    """An opened source."""

    class_names: tuple[str, ...]
    train: Split
    test: Split
    notes: tuple[str, ...] = ()
    """What was decided where the source left a choice, for the user and the manifest."""
    skipped: tuple[str, ...] = ()
    """Rows that were left out already, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """Where images and labels come from. A source says in `find` what there is; what all sources share is done here.

    Its fields are its flags, their docstrings the help.
    """

    name: ClassVar[str]
    """Names the source on the command line and in manifests."""
    unsaid: ClassVar[tuple[str, ...]] = ()
    """Fields that a manifest has only where they are given: those that manifests of earlier versions do not have."""

    train_per_class: int | None = None
    """Keep this many training images a class, drawn at random; without it all."""
    test_per_class: int | None = None
    """Keep this many test images a class, drawn at random; without it all."""
    subset_seed: int = 0
    """Seed of what is drawn: the images that are kept, those that --holdout-clean sets aside, and test images where
    there is no test split."""
    on_bad_image: OnBadImage = "fail"
    """What to do about an image that cannot be read: stop, or leave it out and list it in the manifest. To leave
    images out, every image is decoded once more beforehand, since the number of poisoned ones is exact."""

    def __post_init__(self):
        for name in ("train_per_class", "test_per_class"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{value} images a class", where=name, expected="1 or more")
        if self.subset_seed < 0:
            raise UserError(f"seed {self.subset_seed} is negative", where="subset_seed", expected="0 or more")

    @abstractmethod
    def find(self) -> OpenSource:
        """Find all images and read their labels, without decoding images.

        Raises:
            UserError: nothing there, or not as this source needs it.
        """

    def open(self) -> OpenSource:
        """Find the images, check their labels, and keep as many a class as were asked for.

        Raises:
            UserError: as `find`; labels that are no classes, a class without an image, or with too few.
        """
        found = self.find()
        where = getattr(self, "root", None)
        notes = check_classes(found.class_names, found.train.labels, found.test.labels, where=where)
        splits = []
        for stream, (split, part) in enumerate((("train", found.train), ("test", found.test))):
            option = f"{split}_per_class"
            count = getattr(self, option)
            if count is not None:
                rng = np.random.default_rng([self.subset_seed, stream])
                part = part.take(balanced_subset(part.labels, count, found.class_names, rng, where=option))
            splits.append(part)
        return OpenSource(found.class_names, splits[0], splits[1], (*found.notes, *notes), found.skipped)

    @property
    def stem(self) -> str:
        """What its images are called in folder names."""
        return self.name

    @property
    def slug(self) -> str:
        """Names the source in a data set's folder name."""
        return self.stem if self.train_per_class is None else f"{self.stem}-{self.train_per_class}pc"

    def describe(self) -> dict[str, Any]:
        """The config as JSON values; folders are absolute, so that equal names in different places differ."""
        described: dict[str, Any] = {"kind": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in self.unsaid and value == field.default:
                continue
            described[field.name] = storable(os.path.realpath(value)) if isinstance(value, Path) else value
        return described


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
                hint="give image_px, to make all images squares, and --fit, to say how (crop, pad or stretch)",
            )
        return height
    raise UserError("not one training image can be read")


def folder_name(root: Path) -> str:
    """The name of a folder, wherever a path to it leads."""
    return storable(os.path.basename(os.path.realpath(root)))  # resolve() raises on links that lead in a circle


def storable(path: str | Path) -> str:
    """A path as text for JSON and Parquet: bytes that are not UTF-8, as in old archives, are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
