"""The layout of .beton files: FFCV's format version 2 with three fields, `image` (raw RGB, uint8, or JPEG), `label` and
`index` (int64). Sample i has index i; all images of a file have one size and are stored in one way.

It is written down here because files are checked before FFCV may see them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.errors import UserError

VERSION = 2
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", 1024)])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
REGION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELDS = (("image", 2), ("label", 1), ("index", 1))  # name and FFCV's type number
JPEG, RAW = 0, 1  # FFCV's modes
_END_OF_IMAGE = b"\xff\xd9"
_MIN_PAGE, MAX_PAGE = 1 << 21, 1 << 30  # Linux writes at most 2 GiB less 4 KiB at once, FFCV expects a whole page
MAX_SIDE = (1 << 16) - 1  # width and height are 16-bit in the sample table


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
    except _Bad as error:
        raise UserError(str(error), where=path, hint="prepare the data set again") from error


class _Bad(Exception):
    """What is wrong with the file."""


def _check(path: Path, file: BinaryIO, size: int) -> BetonInfo:
    count, table_ptr = _check_head(file, size)
    samples = _read(file, SAMPLE, count)
    image = samples["image"]
    width, height = int(image["width"][0]), int(image["height"][0])
    jpeg = bool(image["mode"][0] == JPEG)
    if not (image["mode"] == (JPEG if jpeg else RAW)).all():
        raise _Bad("the samples are not all stored as raw pixels, nor all as JPEG")
    if not width or not height or (image["width"] != width).any() or (image["height"] != height).any():
        raise _Bad("the images are not all of one size")
    if (samples["index"] != np.arange(count)).any():
        raise _Bad("the sample indices are not 0 to n - 1")

    file.seek(table_ptr)
    regions = _read(file, REGION, count)
    regions = regions[np.argsort(regions["sample_id"], kind="stable")]
    if (regions["sample_id"] != np.arange(count)).any() or (regions["ptr"] != image["data_ptr"]).any():
        raise _Bad("the table of regions does not match the table of samples")
    by_place = regions[np.argsort(regions["ptr"], kind="stable")]
    starts, sizes = by_place["ptr"], by_place["size"]
    whole = (sizes > 0) if jpeg else (sizes == width * height * 3)
    # each compared with the file before they are added: sums of damaged 64-bit numbers would wrap
    first = head_bytes(count)
    inside = starts[0] >= first and starts[-1] <= table_ptr and sizes.max() <= table_ptr - first
    if not whole.all() or not inside or (np.append(starts[1:], np.uint64(table_ptr)) < starts + sizes).any():
        raise _Bad("a sample's pixels lie outside the data or over another's")
    if jpeg and not _closed(file, starts, starts + sizes):
        raise _Bad("a JPEG does not end where its region ends")
    labels, index = samples["label"].astype(np.int64), samples["index"].astype(np.int64)
    data_ptr, data_bytes = image["data_ptr"].astype(np.uint64), regions["size"].astype(np.uint64)
    return BetonInfo(path, count, height, width, labels, index, data_ptr, data_bytes, jpeg)


def _check_head(file: BinaryIO, size: int) -> tuple[int, int]:
    """The number of samples, and where the table of regions is; the file stands at the table of samples then."""
    if size < HEADER.itemsize:
        raise _Bad(f"the file is truncated: {size} bytes do not hold a .beton header")
    header = _read(file, HEADER, 1)[0]
    if header["version"] != VERSION or header["num_fields"] != len(FIELDS):
        raise _Bad(f"not a .beton file of this project (version {header['version']}, {header['num_fields']} fields)")
    page, count, table_ptr = int(header["page_size"]), int(header["num_samples"]), int(header["table_ptr"])
    if table_ptr == 0:
        raise _Bad("the file was never finished: its writer was stopped")
    if page < _MIN_PAGE or page & (page - 1):
        raise _Bad(f"damaged header: page size {page}")
    # checked before anything of that size is read: an edited count must not ask for all the memory there is
    if count == 0 or head_bytes(count) > table_ptr or table_ptr + count * REGION.itemsize != size:
        raise _Bad(f"truncated or damaged: {size} bytes do not fit its {count} samples")
    for descriptor, (name, type_id) in zip(_read(file, FIELD, len(FIELDS)), FIELDS):
        found = descriptor["name"].tobytes().rstrip(b"\0")
        if found != name.encode() or descriptor["type_id"] != type_id:
            raise _Bad(f"field {found!r} of type {descriptor['type_id']} where {name!r} belongs")
    return count, table_ptr


def _read(file: BinaryIO, dtype: np.dtype, count: int) -> np.ndarray:
    raw = file.read(dtype.itemsize * count)
    if len(raw) != dtype.itemsize * count:
        raise _Bad("the file is truncated")
    return np.frombuffer(raw, dtype=dtype)


def _closed(file: BinaryIO, starts: np.ndarray, ends: np.ndarray) -> bool:
    """Does each JPEG end where the next begins or, where the rest of a page is free, with the marker of its end?"""
    for end in ends[np.append(ends[:-1] != starts[1:], True)].tolist():
        file.seek(end - 2)
        if file.read(2) != _END_OF_IMAGE:
            return False
    return True


def expect(info: BetonInfo, count: int | None, px: int | None, classes: int | None = None) -> None:
    """Compare with what the manifest says, where it is given.

    Raises:
        UserError: another number of images, images of another size, or a label of no class.
    """
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
    if classes is not None and ((info.labels < 0) | (info.labels >= classes)).any():
        first = int(np.argmax((info.labels < 0) | (info.labels >= classes)))
        raise UserError(
            f"label {info.labels[first]} is not a class, 0 to {classes - 1}",
            where=f"{info.path}, sample {first}",
            hint="prepare the data set again, or copy it again",
        )


def head_bytes(count: int) -> int:
    """The size of header, fields and table of samples."""
    return HEADER.itemsize + len(FIELDS) * FIELD.itemsize + count * SAMPLE.itemsize


def page_bytes(sample_bytes: int) -> int:
    """The size of a page, which holds whole samples."""
    # some 32 samples keep the unused rest of a page below a few per cent.
    return max(_MIN_PAGE, min(MAX_PAGE, 1 << (32 * sample_bytes - 1).bit_length()))


def file_bytes(count: int, px: int) -> int:
    """The size of a file of `count` images of `px` x `px` pixels: header and table, whole pages of whole samples, and
    where each sample lies."""
    sample_bytes = px * px * 3
    page = page_bytes(sample_bytes)
    pages = -(-head_bytes(count) // page) + -(-count // (page // sample_bytes))
    return pages * page + count * REGION.itemsize
