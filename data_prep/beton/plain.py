"""The .beton files of this project read with numpy and Pillow alone, for machines without FFCV: the same samples as its
loader gives. They were checked before."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_prep.beton.format import BetonInfo
from data_prep.beton.jpeg import decode_jpeg


def ffcv_installed() -> bool:
    """Is there an FFCV on this machine? One that cannot be loaded counts: that is an error to report."""
    return importlib.util.find_spec("ffcv") is not None


class PlainSamples:
    """The images of a file, memory-mapped."""

    def __init__(self, info: BetonInfo):
        self._pointers, self._shape = info.data_ptr.astype(np.int64), (info.height_px, info.width_px, 3)
        content = np.memmap(info.path, dtype=np.uint8, mode="r")
        self._windows: Any = np.lib.stride_tricks.sliding_window_view(content, int(np.prod(self._shape)))

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (b, H, W, 3) for every `batch_size` indices of `order`."""
        for start in range(0, len(order), batch_size):
            chosen = self._pointers[order[start : start + batch_size].astype(np.int64)]
            yield self._windows[chosen].reshape(-1, *self._shape)

    def close(self) -> None:
        """Nothing is open but the mapping."""


class PlainJpegs:
    """As `PlainSamples`, for images that are stored as JPEG.

    Args:
        threads: that decode.
    """

    def __init__(self, info: BetonInfo, *, threads: int):
        self._starts, self._size, self._threads = (
            info.data_ptr.astype(np.int64),
            (info.height_px, info.width_px),
            threads,
        )
        self._ends = self._starts + info.data_bytes.astype(np.int64)
        self._content = np.memmap(info.path, dtype=np.uint8, mode="r")

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (b, H, W, 3) for every `batch_size` indices of `order`.

        Raises:
            ValueError: an image that cannot be decoded.
        """
        height, width = self._size

        def decode(i: int) -> np.ndarray:
            data = self._content[self._starts[i] : self._ends[i]]
            return decode_jpeg(data.tobytes(), height_px=height, width_px=width)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(order), batch_size):
                yield np.stack(list(pool.map(decode, order[start : start + batch_size].tolist())))

    def close(self) -> None:
        """Nothing is open but the mapping."""
