"""The .beton files of this project written and read with numpy alone, for machines without FFCV.

The same bytes as FFCV's own single writer makes, and the same samples as its loader gives. Only
`data_prep.beton.ffcv` uses this; its files are checked there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton.jpeg import decode_jpeg


def ffcv_installed() -> bool:
    """Is there an FFCV on this machine? One that cannot be loaded counts: that is an error to be told."""
    return importlib.util.find_spec("ffcv") is not None


class PlainFile:
    """A file that is being written, sample by sample.

    Args:
        path: of the file.
        head: header and field descriptions, to be written again with the table's place at the end.
        samples: zeros (n,) of the sample table's type; filled in here.
        regions: zeros (n,) of the region table's type; filled in here.
        page_bytes: size of the pages that hold whole samples.
    """

    def __init__(self, path: Path, *, head: np.ndarray, samples: np.ndarray, regions: np.ndarray, page_bytes: int):
        self._head, self._samples, self._regions, self._page = head, samples, regions, page_bytes
        self._done = 0
        self._file = open(path, "wb")  # closed by `finish` or `discard`  # noqa: SIM115
        start = head.nbytes + samples.nbytes
        self._next = -(-start // page_bytes) * page_bytes  # pages begin at multiples of their size

    def put(self, data: bytes, label: int, *, mode: int, height_px: int, width_px: int) -> None:
        """Append a sample: its pixels or its JPEG, as FFCV's `mode` says."""
        size = len(data)
        if self._next % self._page + size > self._page:
            self._next += self._page - self._next % self._page
        sample = self._samples[self._done : self._done + 1]
        sample["image"]["mode"] = mode
        sample["image"]["height"], sample["image"]["width"] = height_px, width_px
        sample["image"]["data_ptr"] = self._next
        sample["label"], sample["index"] = label, self._done
        self._regions[self._done] = (self._done, self._next, size)
        self._file.seek(self._next)
        self._file.write(data)
        self._next += size
        self._done += 1

    def finish(self, header: np.ndarray) -> None:
        """Write the tables and close the file.

        Args:
            header: (1,), whose `table_ptr` is filled in.
        """
        end = -(-self._next // self._page) * self._page
        self._file.truncate(end)
        self._file.seek(end)
        self._file.write(self._regions.tobytes())
        header["table_ptr"] = end
        self._head[: header.nbytes] = header.view(np.uint8)
        self._file.seek(0)
        self._file.write(self._head.tobytes() + self._samples.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())  # a disk that is full says so here
        self._file.close()

    def discard(self) -> None:
        self._file.close()


class PlainSamples:
    """The images of a file, memory-mapped.

    Args:
        pointers: uint64 (n,), where in the file each image begins.
        shape: (H, W, 3) of every image.
    """

    def __init__(self, path: Path, pointers: np.ndarray, shape: tuple[int, int, int]):
        self._pointers, self._shape = pointers.astype(np.int64), shape
        content = np.memmap(path, dtype=np.uint8, mode="r")
        self._windows: Any = np.lib.stride_tricks.sliding_window_view(content, int(np.prod(shape)))

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (b, H, W, 3) for every `batch_size` indices of `order`."""
        for start in range(0, len(order), batch_size):
            chosen = self._pointers[order[start : start + batch_size].astype(np.int64)]
            yield self._windows[chosen].reshape(-1, *self._shape)


class PlainJpegs:
    """As `PlainSamples`, for images that are stored as JPEG.

    Args:
        sizes: uint64 (n,), bytes of each.
        threads: that decode.
    """

    def __init__(
        self, path: Path, pointers: np.ndarray, sizes: np.ndarray, shape: tuple[int, int, int], *, threads: int
    ):
        self._starts, self._shape, self._threads = pointers.astype(np.int64), shape, threads
        self._ends = self._starts + sizes.astype(np.int64)
        self._content = np.memmap(path, dtype=np.uint8, mode="r")

    def batches(self, order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (b, H, W, 3) for every `batch_size` indices of `order`.

        Raises:
            ValueError: an image that cannot be decoded.
        """
        height, width, _ = self._shape

        def decode(i: int) -> np.ndarray:
            data = self._content[self._starts[i] : self._ends[i]]
            return decode_jpeg(data.tobytes(), height_px=height, width_px=width)

        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(order), batch_size):
                yield np.stack(list(pool.map(decode, order[start : start + batch_size].tolist())))
