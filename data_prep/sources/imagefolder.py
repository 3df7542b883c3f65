"""A folder of image files, a folder a class."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.io import limits
from data_prep.sources.labels import Labels, sorted_names
from data_prep.sources.listing import read_list, split_name
from data_prep.sources.pictures import Found, PictureSource
from data_prep.sources.source import OpenSource, folder_name, storable
from data_prep.sources.split import Encoded
from data_prep.sources.split_names import split_of, training
from data_prep.sources.walk import Walk


@dataclass(frozen=True, kw_only=True)
class ImageFolder(PictureSource):
    """A folder of image files: ROOT/train/CLASS/ and ROOT/test (or validation, valid, val) likewise, or ROOT/CLASS/.

    The pictures of a class may lie in folders of their own below it. Other files are passed over, and counted.
    """

    name: ClassVar[str] = "imagefolder"
    unsaid: ClassVar[tuple[str, ...]] = (*PictureSource.unsaid, "list")

    root: Path
    """The folder that holds train and test, or the classes."""
    image_px: int = 224
    """Side of the square that every image is made."""
    resize_px: int = 256
    """With fit crop, the shorter side is resized to this first, and the central image-px are kept."""
    list: Path | None = None
    """A CSV or JSON file of paths, relative to ROOT, and labels; a column called split names train and test."""
    follow_links: bool = False
    """Follow symbolic links that lead out of ROOT. Refused otherwise: in a folder from strangers, a link would copy a
    file of yours into the data set."""

    def __post_init__(self):
        super().__post_init__()
        self.check_px(self.image_px)
        if self.fit == "crop" and self.image_px > self.resize_px:
            raise UserError(
                f"a crop of {self.image_px} px does not fit a shorter side of {self.resize_px} px",
                where="image_px, resize_px",
                expected="1 <= image_px <= resize_px",
            )
        if not 1 <= self.resize_px <= limits.IMAGE_PX:
            raise UserError(
                f"a shorter side of {self.resize_px} px", where="resize_px", expected=f"1 to {limits.IMAGE_PX}"
            )

    def find(self) -> OpenSource:
        walk = Walk(self.root, follow_links=self.follow_links)
        geometry = self.geometry(self.image_px, self.resize_px)
        if self.list is not None:
            return self.assemble(self._listed(self.list, walk), self.root, self.list, geometry)
        if not self.root.is_dir():
            raise UserError("not an image folder", where=self.root, expected="ROOT/train/CLASS/ or ROOT/CLASS/")
        splits = self._splits(walk)
        classes: list[str] = []

        def reader(path: Path) -> Callable[[], Found]:
            return lambda: self._split(path, walk, classes)

        opened = self.assemble({s: reader(path) for s, path in splits.items()}, self.root, self.root, geometry)
        return replace(opened, notes=(*opened.notes, *walk.note()))

    def _splits(self, walk: Walk) -> dict[str, Path]:
        """The folders of splits by name; the root alone, without a name, where the classes lie in it."""
        folders = {name: self.root / name for name in walk.folders(self.root)}
        splits = {name.lower(): path for name, path in folders.items() if split_of(name) == name.lower()}
        asked = [name for name in (self.train_split, self.test_split) if name is not None and name in folders]
        splits |= {name: folders[name] for name in asked}  # by any name
        others = set(folders.values()) - set(splits.values())
        flat = not asked and all(not walk.folders(path) and walk.pictures(path) for path in splits.values())
        if others and splits and flat:
            splits = {}  # a class called train, among other classes
        if not splits and len(folders) == 1 and len(walk.folders(*folders.values())) > 1:
            (inner,) = folders.values()
            raise UserError("the splits or classes lie one folder deeper", where=self.root, hint=f"give --root {inner}")
        if splits and self.train_split is None and training(splits) is None:
            raise UserError(
                f"not an image folder: there is {', '.join(splits)}, and no train", where=self.root,
                expected="ROOT/train/CLASS/ or ROOT/CLASS/",
            )  # fmt: skip
        return splits or {"": self.root}

    def _split(self, folder: Path, walk: Walk, classes: MutableSequence[str]) -> Found:
        """The pictures of every class folder; the first split that is read, train, says which classes there are."""
        walk.check_link(folder)
        names = sorted_names(walk.folders(folder))
        for name in names:
            if storable(name) != name:
                raise UserError("the class folder's name is not UTF-8", where=folder / name, hint="rename it")
        is_first = not classes
        if not is_first and not set(names) & set(classes):
            names = []  # pictures without labels, as competitions have them
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = walk.pictures(folder / name)
            if not found and is_first:
                raise UserError("the class folder is empty", where=folder / name, expected="at least one image a class")
            paths += found
            labels += [label] * len(found)
        classes += names if is_first else []
        return self._found(paths, np.array(labels, dtype=np.int64), names, folder)

    def _listed(self, path: Path, walk: Walk) -> dict[str, Callable[[], Found]]:
        """The pictures of a list, by split."""
        rows: dict[str, list[tuple[Path, str]]] = {}
        parents: set[Path] = set()
        root = os.path.realpath(self.root)
        for place, label, split in read_list(path):
            picture = Path(os.path.normpath(self.root / place))
            if picture.parent not in parents:
                parents.add(picture.parent)
                if not self.follow_links and os.path.commonpath([root, os.path.realpath(picture.parent)]) != root:
                    raise UserError(
                        f"path {place!r} leads out of {self.root}", where=path, expected="paths relative to ROOT",
                        hint="give follow_links where you made this list yourself",
                    )  # fmt: skip
            walk.check_link(picture)
            rows.setdefault(split_name(split), []).append((picture, label))

        def reader(listed: list[tuple[Path, str]]) -> Callable[[], Found]:
            names = sorted_names(sorted({label for _, label in listed}))
            place = {name: i for i, name in enumerate(names)}
            labels = np.array([place[label] for _, label in listed], dtype=np.int64)
            return lambda: self._found([picture for picture, _ in listed], labels, names, path)

        return {split: reader(listed) for split, listed in rows.items()}

    def _found(self, paths: Sequence[Path], labels: np.ndarray, names: Sequence[str], where: Path) -> Found:
        def fetch(positions: np.ndarray) -> Iterator[Encoded]:
            return (paths[i] for i in positions)

        def locate(i: int) -> str:
            return storable(os.path.relpath(paths[i], self.root))

        return Found(Labels(labels, np.zeros(len(labels), dtype=bool), tuple(names)), fetch, locate, where)

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        del described["follow_links"]  # says what is allowed, not what the data set is
        return described

    @property
    def stem(self) -> str:
        return folder_name(self.root)
