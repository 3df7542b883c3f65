"""A folder of image files, a folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.images import Geometry
from data_prep.io import limits
from data_prep.sources.classes import difference
from data_prep.sources.source import OpenSource, Source, folder_name, storable
from data_prep.sources.split import Split


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Source):
    """A folder of image files: ROOT/train/CLASS/*.jpg or *.png, and ROOT/test or ROOT/val likewise."""

    name: ClassVar[str] = "imagefolder"

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

    def find(self) -> OpenSource:
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
                f"classes differ from those in train: {difference(names, test_names)}",
                where=test_folders[0],
                expected="the same class folders in both",
            )
        geometry = Geometry(resize_px=self.resize_px, crop_px=self.image_px)
        train, test = (self._split(folder, names, geometry) for folder in (train_folder, test_folders[0]))
        return OpenSource(tuple(names), train, test)

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
            locate=lambda i: storable(paths[i].relative_to(self.root)),
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

    @property
    def stem(self) -> str:
        return folder_name(self.root)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        if storable(name) != name:
            raise UserError("the class folder's name is not UTF-8", where=folder / name, hint="rename it")
    return names


def _is_clutter(path: Path) -> bool:
    """What file managers leave behind; anything else that is not an image is reported, not skipped."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")
