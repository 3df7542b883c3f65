"""Arrays of .npz files that nobody vouches for: never pickled, never larger than the file that holds them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from tokenize import TokenError

import numpy as np

from data_prep.io.limits import refuse_pipes

_MOST_ARRAYS = 100
"""Each is opened by itself."""


def map_arrays(path: Path, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Arrays of an uncompressed .npz by name, mapped rather than read: they may be larger than the memory.

    Args:
        path: of the file.
        names: of the arrays; None takes all.

    What a header promises is held against the size of the file before anything of that size exists; `np.load` reserves
    the memory first.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        ValueError: not such a file, an array missing, compressed, of objects, or larger than the file.
    """
    refuse_pipes(path)
    try:
        if names is None:
            with zipfile.ZipFile(path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
            if len(names) > _MOST_ARRAYS:
                raise ValueError(f"{len(names)} arrays, expected at most {_MOST_ARRAYS}")
        return {name: _map_member(path, name) for name in names}
    except KeyError as error:
        raise ValueError(str(error.args[0])) from error
    except (
        zipfile.BadZipFile, EOFError, OverflowError, NotImplementedError, struct.error, SyntaxError, TypeError,
        TokenError, UnicodeDecodeError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _map_member(path: Path, name: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        file.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        start = info.header_offset + 30 + name_length + extra_length
        file.seek(start)
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has format {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject or dtype.kind not in "biufU":
            raise ValueError(f"{name} has dtype {dtype}")
        count = 1
        for length in shape:
            count *= length  # Python's integers, which do not wrap around
        if min(shape, default=1) < 0 or file.tell() + count * dtype.itemsize > start + info.file_size:
            raise ValueError(f"{name} of shape {shape} is larger than its part of the file")
        if count * dtype.itemsize == 0:
            return np.zeros(shape, dtype=dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
