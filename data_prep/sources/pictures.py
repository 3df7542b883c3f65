"""What sources of image files share: which split is which, classes from labels of any kind, sizes and backgrounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.images import Background, Fit, Geometry
from data_prep.io import limits
from data_prep.sources.labels import Labels, joined
from data_prep.sources.source import OpenSource, Source
from data_prep.sources.split import Encoded, Split
from data_prep.sources.split_names import measuring, training


@dataclass(frozen=True)
class Found:
    """One split as its files give it."""

    labels: Labels
    fetch: Callable[[np.ndarray], Iterator[Encoded]]
    """As for `Split`."""
    locate: Callable[[int], str]
    """As for `Split`."""
    where: Path | str
    """Its folder or file, for errors."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PictureSource(Source):
    """A source of image files, or of tables that hold them."""

    unsaid: ClassVar[tuple[str, ...]] = ("fit", "background", "train_split", "test_split", "test_fraction")

    fit: Fit = "crop"
    """How images become squares of image-px. crop: the central square. pad: the whole image, the rest filled with the
    background. stretch: the whole image, both sides resized."""
    background: Background = "white"
    """Colour behind transparent pixels, and beside padded images."""
    train_split: str | None = None
    """The split to train on; without it train."""
    test_split: str | None = None
    """The split to measure on; without it test, else validation (valid, val, dev)."""
    test_fraction: float = 0.1
    """Share of the training images of every class that are set aside as test images (drawn with subset-seed) where
    there is no split with labels to measure on."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.test_fraction < 1:
            raise UserError(
                f"test fraction {self.test_fraction} is out of range",
                where="test_fraction",
                expected="above 0 and below 1",
            )
        if self.train_split is not None and self.train_split == self.test_split:
            raise UserError(f"both are {self.train_split!r}", where="train_split, test_split", expected="two splits")

    def check_px(self, image_px: int | None) -> None:
        """Raises:
        UserError: a size that no image can have, or none where the fit needs one.
        """
        if image_px is not None and not 1 <= image_px <= limits.IMAGE_PX:
            raise UserError(f"images of {image_px} px", where="image_px", expected=f"1 to {limits.IMAGE_PX}")
        if image_px is None and self.fit != "crop":
            raise UserError(f"fit {self.fit} without a size", where="fit", hint="give image_px too")

    def geometry(self, image_px: int | None, resize_px: int | None = None) -> Geometry:
        """Of every image."""
        return Geometry(resize_px=resize_px, crop_px=image_px, fit=self.fit, background=self.background)

    def assemble(
        self, splits: Mapping[str, Callable[[], Found]], folder: Path | None, where: Path | str, geometry: Geometry
    ) -> OpenSource:
        """Choose the splits, and make one list of classes for both.

        Args:
            splits: by name; called for those that are needed.
            folder: put before origins in errors.
            where: all of them, for errors.
            geometry: of every image.

        Raises:
            UserError: no training images, no such split, labels that do not fit together.
        """
        notes: list[str] = []
        named = self._named(splits, self.train_split, "train_split", where) if self.train_split else training(splits)
        if named is None:
            rest = [name for name in splits if name != self.test_split]
            if len(rest) != 1:
                raise UserError(
                    "no training images" + (f"; the splits are {', '.join(splits)}" if splits else ""),
                    where=where,
                    expected="a split called train, a folder train, or files called train*",
                    hint="name one with train_split" if splits else None,
                )
            named = rest[0]
            if named:
                notes.append(f"the only split, {named}, is trained on")
        train = splits[named]()
        test_name, test = self._test(splits, named, where, notes)
        kept, skipped = zip(*(self._labelled(one, name) for name, one in ((named, train), (test_name, test)) if one))
        where = test.where if test is not None else train.where
        names, codes, said = joined(*(one.labels for one in kept), *([] if len(kept) > 1 else [None]), where=where)
        notes += [*([said] if said else []), *(note for one in kept for note in one.notes)]
        made = [
            Split(labels, fetch=one.fetch, locate=one.locate, folder=folder, geometry=geometry)
            for labels, one in zip(codes, kept)
        ]
        if test is None:
            made, drawn = self._drawn(made[0], len(names))
            notes.append(drawn)
        return OpenSource(
            names, made[0], made[1], tuple(dict.fromkeys(notes)), tuple(row for rows in skipped for row in rows)
        )

    def _named(self, splits: Mapping[str, Any], name: str, flag: str, where: Path | str) -> str:
        if name not in splits:
            shown = ", ".join(split or "(without a name)" for split in splits) or "none"
            raise UserError(f"no split {name!r} in {where}", where=flag, expected=f"one of {shown}")
        return name

    def _test(
        self, splits: Mapping[str, Callable[[], Found]], train: str, where: Path | str, notes: list[str]
    ) -> tuple[str, Found | None]:
        """The split to measure on, None where none has labels; what was decided goes to `notes`."""
        if self.test_split is not None:
            found = splits[self._named(splits, self.test_split, "test_split", where)]()
            if not found.labels.usable:
                raise UserError(
                    f"split {self.test_split!r} has no labels", where="test_split", expected="a split with labels"
                )
            return self.test_split, found
        choice = [name for name in measuring(splits) if name != train]
        for i, name in enumerate(choice):
            found = splits[name]()
            if found.labels.usable:
                if choice[i + 1 :]:
                    rest = ", ".join(choice[i + 1 :])
                    notes.append(f"{name} is measured on; left aside: {rest} (--test-split chooses)")
                elif name != "test":
                    notes.append(f"{name} is measured on")
                return name, found
            notes.append(f"{name} has no labels and is left aside")
        return "", None

    def _labelled(self, found: Found, name: str) -> tuple[Found, list[str]]:
        """The rows with a label, and what was left out.

        Raises:
            UserError: a row has none, and nothing is to be left out.
        """
        labels = found.labels
        rows = np.flatnonzero(labels.unlabelled if self.on_bad_image == "skip" else labels.missing)
        if not len(rows):
            return found, []
        if self.on_bad_image == "fail" or not labels.usable:
            many = f" ({len(rows):,} of {len(labels.codes):,})" if len(rows) > 1 else ""
            raise UserError(
                f"{name + ' ' if name else ''}row {rows[0]}: the label is null{many}",
                where=found.where,
                expected="a label in every row",
                hint="leave such rows out with on_bad_image skip" if labels.usable else None,
            )
        keep = np.flatnonzero(~labels.unlabelled)
        part = replace(labels, codes=labels.codes[keep], missing=labels.missing[keep])
        fetch, locate = found.fetch, found.locate
        fewer = replace(found, labels=part, fetch=lambda at: fetch(keep[at]), locate=lambda i: locate(int(keep[i])))
        return fewer, [f"{locate(int(row))}: no label" for row in rows]

    def _drawn(self, everything: Split, classes: int) -> tuple[list[Split], str]:
        """Training and test images from one split, class by class; a class of one image stays in training."""
        rng, is_test = np.random.default_rng([self.subset_seed, 3]), np.zeros(len(everything), dtype=bool)
        order = np.argsort(everything.labels, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(everything.labels[order])) + 1):
            count = min(max(1, round(self.test_fraction * len(members))), len(members) - 1)
            is_test[rng.permutation(members)[: max(0, count)]] = True
        drawn = (
            f"no test images with labels: {int(is_test.sum()):,} of {len(everything):,} training images, "
            f"{self.test_fraction:.3g} of every class, were set aside for it (--test-fraction, --subset-seed)"
        )
        return [everything.take(~is_test), everything.take(is_test)], drawn
