"""Hashes: of files, to find damage, and of decoded samples, to tell data sets apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.io.limits import refuse_pipes


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes.

    Raises:
        OSError: it cannot be read.
    """
    refuse_pipes(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ContentHash:
    """sha256 over a split's decoded samples in index order, fed a batch at a time.

    It covers image size, pixels, given labels and, by their order, indices; not how they are stored: the
    batches' sizes make no difference.
    """

    def __init__(self, image_px: int):
        self._hash = hashlib.sha256(f"{image_px}x{image_px}x3 uint8, int64\n".encode())
        self._labels: list[np.ndarray] = []

    def update(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Add images uint8 (b, H, W, 3) and labels int (b,)."""
        self._hash.update(np.ascontiguousarray(images).data)
        self._labels.append(labels.astype("<i8"))

    def hexdigest(self) -> str:
        """Of all that was added; the labels come after the pixels."""
        total = self._hash.copy()
        for labels in self._labels:
            total.update(labels.tobytes())
        return total.hexdigest()


def content_hash(images: np.ndarray, labels: np.ndarray) -> str:
    """`ContentHash` of a whole split: images uint8 (n, H, W, 3), labels int (n,)."""
    digest = ContentHash(images.shape[1])
    digest.update(images, labels)
    return digest.hexdigest()


def data_hash(splits: Mapping[str, str]) -> str:
    """One hash for a data set, from the content hash of each split."""
    return sha256_json(dict(splits))
