"""Writing .beton files: the bytes that FFCV's own writer makes with one worker, without its processes and shared memory
(a worker of FFCV's that dies goes unseen, and so does a disk that was full for a moment)."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton.format import (
    FIELD,
    FIELDS,
    HEADER,
    JPEG,
    MAX_PAGE,
    MAX_SIDE,
    RAW,
    REGION,
    SAMPLE,
    VERSION,
    head_bytes,
    page_bytes,
)  # fmt: skip
from data_prep.beton.jpeg import encode_jpeg
from data_prep.errors import UserError
from data_prep.io.atomic import temporary

_BUFFER_BYTES = 1 << 20


class BetonWriter:
    """Writes one file sample by sample, in index order; a context manager.

    The file appears under its name when the block ends without an error and all samples were written;
    otherwise nothing stays behind. The same samples give the same bytes.

    Args:
        path: of the file to be.
        count: number of samples, n >= 1.
        height_px: of every image.
        width_px: of every image.
        jpeg: `write` is given the bytes of JPEG files instead of pixels.

    Raises:
        UserError: the file cannot be written; the images are too large for the format.
    """

    def __init__(self, path: str | os.PathLike[str], *, count: int, height_px: int, width_px: int, jpeg: bool = False):
        assert count >= 1
        self.path, self.count, self.shape = Path(path), count, (height_px, width_px, 3)
        self._jpeg, self._written, self._partial = jpeg, 0, temporary(self.path)
        sample_bytes = height_px * width_px * 3
        if max(height_px, width_px) > MAX_SIDE or sample_bytes > MAX_PAGE:
            raise UserError(
                f"images of {width_px} x {height_px} px do not fit the format",
                where=self.path,
                expected="at most 18,918 px",
            )
        self._page = page_bytes(sample_bytes)
        self._samples, self._regions = np.zeros(count, dtype=SAMPLE), np.zeros(count, dtype=REGION)
        image = self._samples["image"]
        image["mode"], image["height"], image["width"] = JPEG if jpeg else RAW, height_px, width_px
        with self._errors():
            self._file = open(self._partial, "wb", buffering=_BUFFER_BYTES)  # closed by __exit__  # noqa: SIM115
            self._file.write(self._head(table_ptr=0))
            self._skip_to(self._next_page(head_bytes(count)))

    def write(self, images: np.ndarray | Sequence[bytes], labels: np.ndarray) -> None:
        """Append images uint8 (b, H, W, 3), or b JPEG files' bytes of that size, with their labels int (b,).

        Raises:
            ValueError: wrong dtype or shape, or more samples than announced.
            UserError: the disk is full; a JPEG is too large for the format.
        """
        if self._jpeg == isinstance(images, np.ndarray):
            raise ValueError(f"images are {type(images).__name__}, and jpeg is {self._jpeg}")
        if isinstance(images, np.ndarray):
            if images.dtype != np.uint8 or images.shape[1:] != self.shape:
                raise ValueError(
                    f"images are {images.dtype} {images.shape}, not uint8 (b, {', '.join(map(str, self.shape))})"
                )
        elif any(len(data) > self._page for data in images):
            raise UserError(
                f"a JPEG of {max(map(len, images)):,} bytes does not fit the format",
                where=self.path,
                expected=f"at most {self._page:,} bytes",
            )
        if len(images) != len(labels) or self._written + len(images) > self.count:
            raise ValueError(f"{self._written} + {len(images)} images, {len(labels)} labels, announced {self.count}")
        with self._errors():
            for image, label in zip(images, labels):
                self._put(image.tobytes() if isinstance(image, np.ndarray) else image, int(label))

    def _put(self, data: bytes, label: int) -> None:
        if self._at % self._page + len(data) > self._page:  # pages hold whole samples
            self._skip_to(self._next_page(self._at))
        i = self._written
        self._samples["image"]["data_ptr"][i], self._samples["label"][i], self._samples["index"][i] = self._at, label, i
        self._regions[i] = (i, self._at, len(data))
        self._file.write(data)
        self._at += len(data)
        self._written += 1

    def _next_page(self, at: int) -> int:
        return -(-at // self._page) * self._page

    def _skip_to(self, at: int) -> None:
        self._file.seek(at)  # what is left out reads as zeros
        self._at = at

    def _head(self, *, table_ptr: int) -> bytes:
        header = np.array([(VERSION, len(FIELDS), self._page, self.count, table_ptr)], dtype=HEADER)
        fields = np.zeros(len(FIELDS), dtype=FIELD)
        for field, (name, type_id) in zip(fields, FIELDS, strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
        return header.tobytes() + fields.tobytes()

    def _finish(self) -> None:
        end = self._next_page(self._at)
        self._file.truncate(end)
        self._skip_to(end)
        self._file.write(self._regions.tobytes())
        self._file.seek(0)
        self._file.write(self._head(table_ptr=end) + self._samples.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())  # a disk that is full says so here
        self._file.close()
        self._partial.replace(self.path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._discard()
            raise UserError(f"cannot write the data file ({error.strerror})", where=self.path) from error

    def _discard(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # the error that led here is the one to tell
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink()

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None and self._written != self.count:
                raise ValueError(f"{self._written} of {self.count} samples were written")
            if error is None:
                with self._errors():
                    self._finish()
        finally:
            self._discard()  # renamed by now where all went well


def write_beton(
    path: str | os.PathLike[str],
    images: np.ndarray | Iterable[np.ndarray],
    labels: np.ndarray,
    *,
    jpeg_quality: int | None = None,
) -> None:
    """Write a whole file at once; see `BetonWriter`.

    Args:
        path: of the file to be.
        images: uint8 (n, H, W, 3), or anything that yields n arrays uint8 (H, W, 3).
        labels: int (n,).
        jpeg_quality: of libjpeg; None stores raw pixels.

    Raises:
        UserError: the file cannot be written.
        ValueError: no sample, images of another dtype or of different shapes, or not as many as labels.
    """
    iterator = iter(images)
    first = next(iterator, None)
    if first is None or len(labels) == 0:
        raise ValueError("no sample to write")
    if first.ndim != 3 or first.shape[2] != 3:
        raise ValueError(f"images are {first.shape}, not (H, W, 3)")
    height, width, _ = first.shape
    jpeg = jpeg_quality is not None
    with BetonWriter(path, count=len(labels), height_px=height, width_px=width, jpeg=jpeg) as writer:
        for i, image in enumerate(itertools.chain([first], iterator)):
            if image.shape != first.shape:
                raise ValueError(f"an image of shape {image.shape} among images of {first.shape}")
            writer.write(image[None] if jpeg_quality is None else [encode_jpeg(image, jpeg_quality)], labels[i : i + 1])
