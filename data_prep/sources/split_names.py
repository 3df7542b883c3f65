"""What people call their splits, in names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Iterable

TRAIN = ("train", "training")
TEST = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")
"""Splits to measure on, the one that is taken first where several are there."""

_WORDS = re.compile(rf"({'|'.join((*TRAIN, *TEST))})(?![a-z])")


def split_of(name: str) -> str | None:
    """The split that the name of a file (without its suffix) or folder begins with: "train-00000-of-00002" is of
    train, "Valid" of valid; None for any other name."""
    found = _WORDS.match(name.lower())
    return found[1] if found else None


def training(names: Iterable[str]) -> str | None:
    """Which of these splits is trained on; None where none is called so."""
    return next((name for name in TRAIN if name in set(names)), None)


def measuring(names: Iterable[str]) -> list[str]:
    """Which of these splits can be measured on, the best first."""
    return [name for name in TEST if name in set(names)]
