"""Reading .beton files, through FFCV where it is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.beton.format import BetonInfo, check_beton, expect
from data_prep.beton.plain import PlainJpegs, PlainSamples, ffcv_installed
from data_prep.errors import UserError
from data_prep.threads import available_cores


def read_beton(
    path: str | os.PathLike[str],
    *,
    expect_count: int | None = None,
    expect_px: int | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode a whole file, in index order.

    Args:
        path: of the file.
        expect_count: number of samples that the manifest promises.
        expect_px: side of its images.
        threads: that decode JPEG; without it one for each core.

    Returns:
        images uint8 (n, H, W, 3), C-contiguous; labels int64 (n,); index int64 (n,).

    Raises:
        UserError: as `check_beton`, not what was expected, or a JPEG that cannot be decoded.
    """
    with BetonStream(path, expect_count=expect_count, expect_px=expect_px, threads=threads) as stream:
        images = np.empty((len(stream), *stream.shape), dtype=np.uint8)
        batch = max(1, min(len(stream), (8 << 20) // images[0].nbytes))
        done = 0
        for part, _, _ in stream.batches(np.arange(len(stream)), batch):
            images[done : done + len(part)] = part
            done += len(part)
        return images, stream.labels, stream.index


class BetonStream:
    """One open file; gives its samples in any order, over and over. Keep it for the run: a context manager.

    Args:
        path: of the file.
        expect_count: number of samples that the manifest promises.
        expect_px: side of its images.
        batches_ahead: batches read ahead of the consumer; raw ones on one thread (enough for a gigabyte a second).
        threads: that share the decoding of each batch of JPEGs; without it one for each core.

    Raises:
        UserError: as `check_beton`, or not what was expected.
    """

    labels: np.ndarray
    """int64 (n,), in index order."""
    index: np.ndarray
    """int64 (n,): 0 to n - 1."""
    shape: tuple[int, int, int]
    """(H, W, 3) of every image."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expect_count: int | None = None,
        expect_px: int | None = None,
        batches_ahead: int = 3,
        threads: int | None = None,
    ):
        info = check_beton(path)
        expect(info, expect_count, expect_px)
        self.path, self.labels, self.index = info.path, info.labels, info.index
        self.shape = (info.height_px, info.width_px, 3)
        self._size = self.path.stat().st_size
        threads = (available_cores() if threads is None else threads) if info.jpeg else 1
        self._samples: Any = _samples(info, batches_ahead, threads)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self, order: np.ndarray, batch_size: int, drop_last: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Read samples in the order asked for.

        Args:
            order: int (m,), indices in 0 to n - 1; may repeat.
            batch_size: b.
            drop_last: leave out a last batch of fewer than b.

        Yields:
            images uint8 (b, H, W, 3), labels int64 (b,), index int64 (b,). The images are a view into a ring
            of buffers, valid until the next batch is asked for: copy what is kept.

        Raises:
            IndexError: an index out of range.
            ValueError: no batch at all would come, or order is not one-dimensional integers.
            UserError: the file changed since it was opened; a JPEG cannot be decoded.
        """
        order = np.asarray(order)
        if order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
            raise ValueError(f"order is {order.dtype} {order.shape}, not integers (m,)")
        if batch_size < 1 or len(order) < (batch_size if drop_last else 1):
            raise ValueError(f"{len(order)} samples make no batch of {batch_size} (drop_last={drop_last})")
        if order.min() < 0 or order.max() >= len(self):
            raise IndexError(f"order runs from {order.min()} to {order.max()}, the file holds 0 to {len(self) - 1}")
        if self._samples is None:
            raise ValueError(f"{self.path} is closed")
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        try:
            unchanged = self.path.stat().st_size == self._size
        except OSError:
            unchanged = False
        if not unchanged:  # reading on would end the process with SIGBUS: the file is memory-mapped
            raise UserError("the file was truncated, replaced or removed while in use", where=self.path)
        return self._iterate(order.astype(np.uint64), batch_size)

    def _iterate(self, order: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        images = self._samples.batches(order, batch_size)
        try:
            for start in range(0, len(order), batch_size):
                index = order[start : start + batch_size].astype(np.int64)
                yield next(images), self.labels[index], index
        except ValueError as error:
            raise UserError(
                "an image cannot be decoded: the file is damaged", where=self.path, hint="prepare the data set again"
            ) from error
        finally:
            images.close()

    def close(self) -> None:
        """Stop what is still reading; the stream cannot be used afterwards."""
        if self._samples is not None:
            self._samples.close()
        self._samples = None

    def __enter__(self) -> BetonStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _samples(info: BetonInfo, batches_ahead: int, threads: int) -> Any:
    """What gives the images of a file: through FFCV, or without it."""
    if ffcv_installed():
        from data_prep.beton.ffcv import FFCVSamples

        return FFCVSamples(info, batches_ahead=batches_ahead, threads=threads)
    return PlainJpegs(info, threads=threads) if info.jpeg else PlainSamples(info)
