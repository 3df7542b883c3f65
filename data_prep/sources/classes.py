"""Class names and labels: checked, compared, and drawn from evenly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.errors import UserError


def check_classes(
    class_names: Sequence[str], train_labels: np.ndarray, test_labels: np.ndarray, *, where: Path | None
) -> list[str]:
    """Check labels against the class names.

    Returns:
        A note where a class has no test image.

    Raises:
        UserError: fewer than two classes, a name twice, a label outside the names, a class without a training image,
            no test image at all.
    """
    notes: list[str] = []
    count = len(class_names)
    if count < 2:
        raise UserError(f"{count} class{'es' if count == 0 else ''} only", where=where, expected="two or more classes")
    doubles = sorted(name for name, times in Counter(class_names).items() if times > 1)
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
            what = f"no {split} image of class {shown}{f' and {len(empty) - 5:,} others' if len(empty) > 5 else ''}"
            if split == "test" and len(empty) < count:
                notes.append(what)
                continue
            raise UserError(what, where=where, expected=f"{split} images of every class")
    return notes


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


def holdout(
    labels: np.ndarray, share: float, class_names: Sequence[str], rng: np.random.Generator, *, where: str
) -> np.ndarray:
    """Draw a share of every class: rounded to the nearest image, halves up, and at least one.

    Args:
        labels: int (n,).
        share: strictly between 0 and 1.
        class_names: K names.
        rng: of this draw alone.
        where: the option that asked for it.

    Returns:
        bool (n,): True for those drawn.

    Raises:
        UserError: nothing of a class would be left.
    """
    drawn = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(class_names):
        members = np.flatnonzero(labels == label)
        count = max(1, int(np.floor(share * len(members) + 0.5)))
        if count >= len(members):
            raise UserError(
                f"{share:g} of class {label} ({name}) are {count} of its {len(members)} training images: none is left",
                where=where,
                expected="a share that leaves at least one image of every class to train on",
            )
        drawn[rng.choice(members, size=count, replace=False)] = True
    return drawn


def difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    parts = []
    if missing:
        parts.append(f"missing {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}")
    if extra:
        parts.append(f"unknown {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}")
    return "; ".join(parts) or "another order"
