"""FFCV's .beton files, written and read so that trouble is an error rather than a hang, a crash or wrong
pixels.

The only module that imports FFCV (1.0.2, which nobody maintains). Files hold three fields: `image` (raw RGB,
uint8, or JPEG), `label` and `index` (int64); sample i of a file has index i. All images of a file have one size and are
stored in one way.

FFCV is imported on first use: it pulls in numba, OpenCV and torch. Where it is not installed, plain_beton.py writes
and reads the same files.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import ctypes
import errno
import functools
import itertools
import os
import queue
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from data_prep.beton.jpeg import encode_jpeg
from data_prep.beton.plain import PlainFile, PlainJpegs, PlainSamples, ffcv_installed
from data_prep.errors import UserError
from data_prep.threads import available_cores

# The layout of FFCV's format version 2, written down here because files are checked before FFCV may see them.
_VERSION = 2
_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_ptr", "<u8"),
    ]
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
_REGION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_FIELDS = (("image", 2), ("label", 1), ("index", 1))  # name and FFCV's type number
_JPEG, _RAW = 0, 1  # FFCV's modes
_END_OF_IMAGE = b"\xff\xd9"
_MIN_PAGE, _MAX_PAGE = 1 << 21, 1 << 30  # Linux writes at most 2 GiB less 4 KiB at once, FFCV expects a whole page
_MAX_SIDE = (1 << 16) - 1  # width and height are 16-bit in the sample table


# -------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class BetonInfo:
    """What a .beton file's tables say, after they were checked."""

    path: Path
    count: int
    height_px: int
    width_px: int
    labels: np.ndarray
    """int64 (n,), in index order."""
    index: np.ndarray
    """int64 (n,): 0 to n - 1."""
    data_ptr: np.ndarray
    """uint64 (n,): where in the file each image begins."""
    data_bytes: np.ndarray
    """uint64 (n,): how long each is there."""
    jpeg: bool
    """Stored as JPEG, not as raw pixels."""


def check_beton(path: str | os.PathLike[str]) -> BetonInfo:
    """Check a file's header, tables and regions; the pixels are for the manifest's sha256 to vouch for.

    Raises:
        UserError: missing, not a .beton file, truncated, unfinished, of other fields, or with tables that
            contradict each other.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _check(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise UserError(f"cannot read the data file ({error.strerror})", where=path) from error


def _check(path: Path, file: Any, size: int) -> BetonInfo:
    def bad(what: str) -> UserError:
        return UserError(what, where=path, hint="prepare the data set again")

    def read(dtype: np.dtype, count: int) -> np.ndarray:
        raw = file.read(dtype.itemsize * count)
        if len(raw) != dtype.itemsize * count:
            raise bad("the file is truncated")
        return np.frombuffer(raw, dtype=dtype)

    if size < _HEADER.itemsize:
        raise bad(f"the file is truncated: {size} bytes do not hold a .beton header")
    header = read(_HEADER, 1)[0]
    if header["version"] != _VERSION or header["num_fields"] != len(_FIELDS):
        raise bad(f"not a .beton file of this project (version {header['version']}, {header['num_fields']} fields)")
    page, count, table_ptr = int(header["page_size"]), int(header["num_samples"]), int(header["table_ptr"])
    if table_ptr == 0:
        raise bad("the file was never finished: its writer was stopped")
    if page < _MIN_PAGE or page & (page - 1):
        raise bad(f"damaged header: page size {page}")
    tables_end = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize + count * _SAMPLE.itemsize
    # checked before anything of that size is read: an edited count must not ask for all the memory there is
    if count == 0 or tables_end > table_ptr or table_ptr + count * _REGION.itemsize != size:
        raise bad(f"truncated or damaged: {size} bytes do not fit its {count} samples")

    for descriptor, (name, type_id) in zip(read(_FIELD, len(_FIELDS)), _FIELDS):
        found = descriptor["name"].tobytes().rstrip(b"\0")
        if found != name.encode() or descriptor["type_id"] != type_id:
            raise bad(f"field {found!r} of type {descriptor['type_id']} where {name!r} belongs")

    samples = read(_SAMPLE, count)
    image = samples["image"]
    width, height = int(image["width"][0]), int(image["height"][0])
    jpeg = bool(image["mode"][0] == _JPEG)
    if not (image["mode"] == (_JPEG if jpeg else _RAW)).all():
        raise bad("the samples are not all stored as raw pixels, nor all as JPEG")
    if not width or not height or (image["width"] != width).any() or (image["height"] != height).any():
        raise bad("the images are not all of one size")
    if (samples["index"] != np.arange(count)).any():
        raise bad("the sample indices are not 0 to n - 1")

    file.seek(table_ptr)
    regions = read(_REGION, count)
    regions = regions[np.argsort(regions["sample_id"], kind="stable")]
    if (regions["sample_id"] != np.arange(count)).any() or (regions["ptr"] != image["data_ptr"]).any():
        raise bad("the table of regions does not match the table of samples")
    by_place = regions[np.argsort(regions["ptr"], kind="stable")]
    starts, sizes = by_place["ptr"], by_place["size"]
    whole = (sizes > 0) if jpeg else (sizes == width * height * 3)
    # each compared with the file before they are added: sums of damaged 64-bit numbers would wrap
    inside = starts[0] >= tables_end and starts[-1] <= table_ptr and sizes.max() <= table_ptr - tables_end
    if not whole.all() or not inside or (np.append(starts[1:], np.uint64(table_ptr)) < starts + sizes).any():
        raise bad("a sample's pixels lie outside the data or over another's")
    if jpeg and not _closed(file, starts, starts + sizes):
        raise bad("a JPEG does not end where its region ends")
    labels, index = samples["label"].astype(np.int64), samples["index"].astype(np.int64)
    data_ptr, data_bytes = image["data_ptr"].astype(np.uint64), regions["size"].astype(np.uint64)
    return BetonInfo(path, count, height, width, labels, index, data_ptr, data_bytes, jpeg)


def _closed(file: Any, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Does each JPEG end where the next begins or, where the rest of a page is free, with the marker of its end?"""
    for end in ends[np.append(ends[:-1] != starts[1:], True)].tolist():
        file.seek(end - 2)
        if file.read(2) != _END_OF_IMAGE:
            return False
    return True


def _expect(info: BetonInfo, count: int | None, px: int | None) -> None:
    if count is not None and info.count != count:
        raise UserError(
            f"holds {info.count} images, the manifest says {count}",
            where=info.path,
            hint="prepare the data set again",
        )
    if px is not None and (info.height_px, info.width_px) != (px, px):
        raise UserError(
            f"images are {info.width_px} x {info.height_px} px, the manifest says {px} x {px}",
            where=info.path,
            hint="prepare the data set again",
        )


# -------------------------------------------------------------------------------- writing


def _page_bytes(sample_bytes: int) -> int:
    # A page holds whole samples: some 32 of them keep the unused rest of a page below a few per cent.
    return max(_MIN_PAGE, min(_MAX_PAGE, 1 << (32 * sample_bytes - 1).bit_length()))


def file_bytes(count: int, px: int) -> int:
    """The size of a file of `count` images of `px` x `px` pixels: header and table, whole pages of whole samples, and
    where each sample lies."""
    sample_bytes = px * px * 3
    page = _page_bytes(sample_bytes)
    head = _HEADER.itemsize + len(_FIELDS) * _FIELD.itemsize + count * _SAMPLE.itemsize
    pages = -(-head // page) + -(-count // (page // sample_bytes))
    return pages * page + count * _REGION.itemsize


class BetonWriter:
    """Writes one file sample by sample, in index order; a context manager.

    The file appears under its name when the block ends without an error and all samples were written;
    otherwise nothing stays behind. One writer in this process instead of FFCV's own several: the same samples
    give the same bytes, and there is no process whose death could go unseen.

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
        self._jpeg = jpeg
        self.path, self.count, self.shape = Path(path), count, (height_px, width_px, 3)
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._written = 0
        sample_bytes = height_px * width_px * 3
        if max(height_px, width_px) > _MAX_SIDE or sample_bytes > _MAX_PAGE:
            raise UserError(
                f"images of {width_px} x {height_px} px do not fit the format",
                where=self.path,
                expected="at most 18,918 px",
            )
        self._page = page = _page_bytes(sample_bytes)
        self._plain: PlainFile | None = None
        if not ffcv_installed():
            self._begin_plain(page)
            return
        ffcv = _ffcv()
        fields = {
            "image": ffcv.RGBImageField(write_mode="raw"),
            "label": ffcv.IntField(),
            "index": ffcv.IntField(),
        }
        if jpeg:
            fields["image"].encode = self._put_jpeg  # FFCV's own would encode here, on one thread, at 4:2:0
        self._handle_sample, self._names = ffcv.handle_sample, fields
        self._writer = ffcv.DatasetWriter(str(self._partial), fields, page_size=page, num_workers=1)
        self._writer.num_samples = count
        try:
            self._writer.prepare()
            # Ordinary memory in the place of the shared: it cannot be left behind, nor does it fill /dev/shm, nor is
            # it kept open by the views in an error's traceback.
            self._writer.metadata_sm.close()
            self._writer.metadata_sm.unlink()
            self._table = np.zeros(count, dtype=self._writer.metadata_type)
            self._writer.metadata_sm = SimpleNamespace(buf=self._table.view(np.uint8))
            self._allocator = ffcv.MemoryAllocator(str(self._partial), self._writer.data_region_start, page)
            self._allocator.__enter__()
        except OSError as error:
            self._discard()
            raise UserError(f"cannot write the data file ({error.strerror})", where=self.path) from error
        except BaseException:
            self._discard()
            raise

    def _begin_plain(self, page: int) -> None:
        fields = np.zeros(len(_FIELDS), dtype=_FIELD)
        for field, (name, type_id) in zip(fields, _FIELDS, strict=True):
            field["type_id"] = type_id
            field["name"][: len(name)] = np.frombuffer(name.encode(), dtype=np.uint8)
        self._header = np.array([(_VERSION, len(_FIELDS), page, self.count, 0)], dtype=_HEADER)
        head = np.concatenate([self._header.view(np.uint8), fields.view(np.uint8)])
        samples, regions = np.zeros(self.count, dtype=_SAMPLE), np.zeros(self.count, dtype=_REGION)
        try:
            self._plain = PlainFile(self._partial, head=head, samples=samples, regions=regions, page_bytes=page)
        except OSError as error:
            raise UserError(f"cannot write the data file ({error.strerror})", where=self.path) from error

    def _put_jpeg(self, destination: np.ndarray, data: bytes, malloc: Any) -> None:
        destination["mode"] = _JPEG
        destination["height"], destination["width"] = self.shape[:2]
        destination["data_ptr"], storage = malloc(len(data))
        storage[:] = np.frombuffer(data, dtype=np.uint8)

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
        try:
            if self._plain is not None:
                (height, width, _), mode = self.shape, _JPEG if self._jpeg else _RAW
                for image, label in zip(images, labels):
                    data = image.tobytes() if isinstance(image, np.ndarray) else image
                    self._plain.put(data, int(label), mode=mode, height_px=height, width_px=width)
                    self._written += 1
                return
            names = self._table.dtype.names
            for image, label in zip(images, labels):
                sample = (image, int(label), self._written)
                self._handle_sample(sample, self._written, names, self._table, self._allocator, self._names)
                self._written += 1
        except OSError as error:
            raise UserError(f"cannot write the data file ({error.strerror})", where=self.path) from error

    def __enter__(self) -> BetonWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._discard()
            return
        if self._written != self.count:
            self._discard()
            raise ValueError(f"{self._written} of {self.count} samples were written")
        try:
            if self._plain is not None:
                self._plain.finish(self._header)
            else:
                self._allocator.__exit__(None, None, None)
                self._check_pages()
                self._writer.finalize([self._allocator.allocations[i : i + 1] for i in range(self.count)])
            self._partial.replace(self.path)
        except OSError as problem:
            self._discard()
            raise UserError(f"cannot write the data file ({problem.strerror})", where=self.path) from problem
        except BaseException:
            self._discard()
            raise

    def _check_pages(self) -> None:
        """FFCV does not look at how much of a page the system took: a disk that was full for a moment would leave
        a hole."""
        written = self._allocator.offset + self._allocator.next_page_written.value * self._allocator.page_size
        if self._partial.stat().st_size != written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _discard(self) -> None:
        if self._plain is not None:
            with contextlib.suppress(OSError):
                self._plain.discard()
        allocator = getattr(self, "_allocator", None)
        if allocator is not None and hasattr(allocator, "fp"):
            allocator.fp.close()
        with contextlib.suppress(OSError):  # the error that led here is the one to tell
            self._partial.unlink()


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


# -------------------------------------------------------------------------------- reading


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
        _expect(info, expect_count, expect_px)
        self.path, self.labels, self.index = info.path, info.labels, info.index
        self.shape = (info.height_px, info.width_px, 3)
        self._size = self.path.stat().st_size
        threads = (available_cores() if threads is None else threads) if info.jpeg else 1
        self._plain = None if ffcv_installed() else _plain_samples(info, self.shape, threads)
        self._loader: Any = _loader(info, batches_ahead, threads) if self._plain is None else self._plain
        self._epochs: weakref.WeakSet[Any] = weakref.WeakSet()

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
        if self._loader is None:
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
        if self._plain is not None:
            try:
                for i, images in enumerate(self._plain.batches(order, batch_size)):
                    index = order[i * batch_size : (i + 1) * batch_size].astype(np.int64)
                    yield images, self.labels[index], index
            except ValueError as error:
                raise _undecodable(self.path) from error
            return
        with _lock:  # FFCV's iterator takes the batch size from the loader it is made of
            self._loader.batch_size = batch_size
            epoch = _ffcv().Epoch(self._loader, order)
        self._epochs.add(epoch)
        _alive.add(epoch)
        try:
            for start in range(0, len(order), batch_size):
                (images,) = next(epoch)
                index = order[start : start + batch_size].astype(np.int64)
                yield images, self.labels[index], index
        finally:
            epoch.close()

    def close(self) -> None:
        """Stop what is still reading; the stream cannot be used afterwards."""
        for epoch in list(self._epochs):
            epoch.close()
        self._loader = self._plain = None

    def __enter__(self) -> BetonStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain_samples(info: BetonInfo, shape: tuple[int, int, int], threads: int) -> PlainSamples | PlainJpegs:
    if info.jpeg:
        return PlainJpegs(info.path, info.data_ptr, info.data_bytes, shape, threads=threads)
    return PlainSamples(info.path, info.data_ptr, shape)


def _undecodable(path: Path) -> UserError:
    return UserError("an image cannot be decoded: the file is damaged", where=path, hint="prepare the data set again")


# -------------------------------------------------------------------------------- FFCV itself

_lock = threading.RLock()
_alive: weakref.WeakSet[Any] = weakref.WeakSet()
_engines: dict[bool, Any] = {}
"""Loaders to copy, for raw files and for JPEG."""


@atexit.register
def _close_all() -> None:
    """A decoding thread that outlives the interpreter aborts the process."""
    for epoch in list(_alive):
        epoch.close()


@functools.cache
def _ffcv() -> Any:
    """Import FFCV, with the three of its habits undone that reach beyond it.

    - A numba typed dict of two constants makes the import compile for seconds: a plain dict during the import
      does the same.
    - The import, every Loader and every iteration set torch's thread count to its own worker count: its
      setter is made to do nothing. Decoding stays on one thread, which numba needs no thread pool for.
    - Where CUDA exists, its iterators record events and wait on streams, for transfers that it is never asked
      for here.
    """
    try:
        import numba.typed
        import torch
    except ImportError as error:
        raise UserError(
            f"FFCV's requirements cannot be imported ({error})", hint="install the project again: make setup"
        ) from error
    typed: Any = numba.typed
    threads, typed_dict = torch.get_num_threads(), typed.Dict
    try:
        typed.Dict = dict
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ffcv.libffcv as library
            import ffcv.loader.epoch_iterator as epoch_iterator
            import ffcv.loader.loader as loader_module
            from ffcv.fields import IntField, RGBImageField
            from ffcv.fields.decoders import SimpleRGBImageDecoder
            from ffcv.memory_allocator import MemoryAllocator
            from ffcv.memory_managers import OSCacheManager
            from ffcv.memory_managers.os_cache import OSCacheContext
            from ffcv.pipeline.compiler import Compiler
            from ffcv.reader import Reader
            from ffcv.writer import DatasetWriter, handle_sample
    except (ImportError, OSError) as error:
        raise UserError(f"FFCV cannot be imported ({error})", hint="install the project again: make setup") from error
    finally:
        typed.Dict = typed_dict
        torch.set_num_threads(threads)
    Compiler.set_num_threads = classmethod(lambda cls, n: None)  # pyright: ignore[reportAttributeAccessIssue]
    epoch_iterator.IS_CUDA = False  # pyright: ignore[reportAttributeAccessIssue]

    class Regions(OSCacheManager):
        """FFCV's memory-mapped access, with sizes by sample.

        FFCV looks each sample's size up in a sorted table of addresses, which takes longer to compile than all the
        rest, and keeps dicts of pages that only its other cache reads. `check_beton` has made sure that all
        sizes of raw samples are equal; the decoder of JPEG takes a sample's by its number.
        """

        def __init__(self, reader: Any, sizes: np.ndarray):
            self.reader = reader
            self.ptrs = np.zeros(1, dtype=np.uint64)
            self.sizes = sizes
            self.context = OSCacheContext(self)

        def compile_reader(self) -> Any:
            def read(address, state):
                return state[0][address : address + state[2][0]]

            return Compiler.compile(read)

    loader_module.OSCacheManager = functools.partial(Regions, sizes=np.zeros(1, dtype=np.uint64))

    class JpegDecoder(SimpleRGBImageDecoder):
        """Decodes to the pixels that Pillow gives: FFCV's own decoder asks for the fast DCT, whose pixels differ, and
        leaves what was in the buffer where an image cannot be decoded."""

        def generate_code(self) -> Any:
            init, header, decompress, destroy = _turbojpeg(library.lib)
            flags = _ACCURATE_DCT | _STOP_ON_WARNING

            def decode(batch_indices, destination, metadata, storage_state):
                decoder = init()
                found = np.zeros(4, dtype=np.int32)
                good = decoder != 0
                for i in range(len(batch_indices)):
                    if not good:
                        break
                    sample = batch_indices[i]
                    start, height, width = metadata[sample]["data_ptr"], destination.shape[1], destination.shape[2]
                    data = storage_state[0][start : start + storage_state[2][sample]]
                    at, to = data.ctypes.data, destination[i].ctypes.data
                    where = found.ctypes.data
                    failed = header(decoder, at, data.size, where, where + 4, where + 8, where + 12)
                    # of another size it would be scaled
                    good = failed == 0 and found[0] == width and found[1] == height
                    good = good and decompress(decoder, at, data.size, to, width, 0, height, 0, flags) == 0
                if decoder != 0:
                    destroy(decoder)
                if not good:
                    raise ValueError("TurboJPEG cannot decode an image")
                return destination[: len(batch_indices)]

            return decode

    class Epoch(epoch_iterator.EpochIterator):
        """One pass; what goes wrong on its thread is raised in the consumer, and it can be stopped."""

        failure: BaseException | None = None

        def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
            """FFCV's, with each batch decoded in parts on the loader's threads.

            Not on numba's own: its thread layer may abort the process where two loaders run at once.
            """
            loader: Any = self.loader
            if loader.decoding is None:
                return super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
            pool, threads = loader.decoding
            self.memory_context.start_batch(b_ix)
            ((stage, _),), _ = loader.code
            count = len(batch_indices)

            def part(rows: slice) -> None:
                memory = {f"memory_{k}": v[batch_slot][rows] for k, v in self.memory_allocations["operation"].items()}
                shared = {f"shared_memory_{k}": None for k in self.memory_allocations["shared"]}
                stage(
                    batch_indices=batch_indices[rows], metadata=self.metadata, storage_state=self.storage_state,
                    **memory, **shared,
                )  # fmt: skip

            edges = [count * i // threads for i in range(threads + 1)]
            for _ in pool.map(part, [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]):
                pass
            (buffer,) = self.memory_allocations["operation"].values()
            return (buffer[batch_slot][:count],)

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.failure = error
                while not self.terminate_event.is_set():
                    try:
                        return self.output_queue.put(None, timeout=0.1)
                    except queue.Full:
                        continue

        def __next__(self) -> Any:
            try:
                return super().__next__()
            except StopIteration:
                if isinstance(self.failure, ValueError) and "TurboJPEG" in str(self.failure):
                    raise _undecodable(Path(self.loader.fname)) from self.failure
                if self.failure is not None:
                    raise RuntimeError(f"decoding {self.loader.fname} failed") from self.failure
                raise

        def close(self) -> None:
            if not hasattr(self, "terminate_event"):  # its constructor failed
                return
            self.terminate_event.set()
            self.iter_ixes = iter(())  # no further batch is begun
            while self.is_alive() and threading.current_thread() is not self:
                try:
                    self.output_queue.get_nowait()
                except queue.Empty:
                    self.join(0.005)

    return SimpleNamespace(
        DatasetWriter=DatasetWriter,
        Epoch=Epoch,
        IntField=IntField,
        JpegDecoder=JpegDecoder,
        Loader=loader_module.Loader,
        MemoryAllocator=MemoryAllocator,
        OrderOption=loader_module.OrderOption,
        RGBImageField=RGBImageField,
        Reader=Reader,
        Regions=Regions,
        SimpleRGBImageDecoder=SimpleRGBImageDecoder,
        handle_sample=handle_sample,
    )


_ACCURATE_DCT, _STOP_ON_WARNING = 4096, 8192  # TJFLAG_ACCURATEDCT, TJFLAG_STOPONWARNING


def _turbojpeg(library: ctypes.CDLL) -> tuple[Any, Any, Any, Any]:
    """TurboJPEG's functions, out of the library that FFCV's own is linked with; numba calls them without Python.

    Addresses and handles are whole numbers here: numba compares and adds them.
    """
    address, number = ctypes.c_size_t, ctypes.c_int
    init, header = library.tjInitDecompress, library.tjDecompressHeader3
    decompress, destroy = library.tjDecompress2, library.tjDestroy
    init.restype, init.argtypes = address, []
    header.restype, header.argtypes = number, [address] * 7
    decompress.restype, decompress.argtypes = number, [address] * 4 + [number] * 5
    destroy.restype, destroy.argtypes = number, [address]
    return init, header, decompress, destroy


def _loader(info: BetonInfo, batches_ahead: int, threads: int) -> Any:
    """FFCV's Loader for the images of a file; labels and indices come from its table.

    Making one compiles for a second or two. The compiled code reads any file of these fields, so it is made
    once a process for raw files and once for JPEG, and later loaders are copies with another file behind them.
    """
    ffcv, path = _ffcv(), info.path
    with _lock:
        if info.jpeg not in _engines:
            decoder = ffcv.JpegDecoder() if info.jpeg else ffcv.SimpleRGBImageDecoder()
            pipelines = {"image": [decoder], "label": None, "index": None}
            engine = _engines[info.jpeg] = ffcv.Loader(
                str(path),
                batch_size=1,
                num_workers=1,
                os_cache=True,
                order=ffcv.OrderOption.SEQUENTIAL,
                seed=0,  # without one FFCV draws from numpy's global generator
                drop_last=False,
                pipelines=pipelines,
            )
            # what belongs to this file goes: its mapping would live as long as the process
            engine.reader = engine.memory_manager = engine.traversal_order = engine.graph.metadata = None
            engine.indices = engine.first_traversal_order = None
        engine = _engines[info.jpeg]
        loader = copy.copy(engine)
        loader.fname, loader.batches_ahead = str(path), batches_ahead
        loader.reader = ffcv.Reader(str(path))
        loader.memory_manager = ffcv.Regions(loader.reader, info.data_bytes if info.jpeg else info.data_bytes[:1])
        loader.graph = copy.copy(engine.graph)
        loader.graph.metadata = loader.reader.metadata
        loader.decoding = (ThreadPoolExecutor(threads, "decode"), threads) if threads > 1 else None
        return loader
