"""Labelled images in a fixed order, decoded only when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.images import Geometry, decode_image

Encoded = bytes | Path | np.ndarray | UserError | None
"""One image as its source holds it: an image file's bytes, a path, uint8 (H, W, 3), why there is none, or nothing."""


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

    def decode(self, encoded: Encoded, i: int, conversions: Counter[str] | None = None) -> np.ndarray:
        """Image i from what `stream` gave for it, uint8 (H, W, 3); safe on any thread.

        Args:
            encoded: of `stream`.
            i: its position.
            conversions: what was done to the image is counted here.

        Raises:
            UserError: it cannot be decoded.
        """
        if isinstance(encoded, np.ndarray):
            return encoded
        origin = self.origin(i)
        where = origin if self._folder is None else str(self._folder / origin)
        if isinstance(encoded, UserError):
            raise UserError(encoded.what, where=where, expected=encoded.expected, hint=encoded.hint)
        if encoded is None:
            raise UserError("there is no image, its bytes are null", where=where, expected="the bytes of an image file")
        return decode_image(encoded, where=where, geometry=self._geometry, conversions=conversions)

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


def in_memory(images: np.ndarray, labels: np.ndarray, *, locate: Callable[[int], str]) -> Split:
    """A split of images that are decoded already: uint8 (n, H, W, 3) and int64 (n,)."""
    return Split(labels, fetch=lambda positions: (images[i] for i in positions), locate=locate)
