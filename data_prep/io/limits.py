"""What files from strangers may ask for: a few kilobytes can declare sizes that fill the memory."""

from __future__ import annotations

import errno
from pathlib import Path

JSON_BYTES = 256 << 20
"""Of a JSON file."""
TABLE_ROWS = 100_000_000
"""Of a Parquet table."""
PAGE_BYTES = 1 << 30
"""Of a page of a Parquet file, decompressed, and of a column of labels."""
BATCH_BYTES = 256 << 20
"""Of the images of a Parquet file that are decoded at a time, if every row had the longest value of its page."""
IMAGE_PIXELS = 64 << 20
"""That an image file declares."""
IMAGE_FILE_BYTES = 512 << 20
"""Of an image file; no format needs more for `IMAGE_PIXELS`."""
IMAGE_PX = 8192
"""Side of the largest square that images are resized to."""


def refuse_pipes(path: Path) -> None:
    """Refuse what may never come to an end when it is read.

    Raises:
        OSError: a pipe, a device or a socket.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a folder has an error of its own when it is read
        raise OSError(errno.EINVAL, "not a file but a pipe or a device", str(path))


def read_limited(path: Path, most: int) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, is a pipe or a device, or has more than `most` bytes (EFBIG).
    """
    if "\0" in str(path):  # a path out of somebody's table
        raise OSError(errno.EINVAL, "a null character in its name", str(path))
    refuse_pipes(path)
    with path.open("rb") as file:
        size = path.stat().st_size  # first: what a sparse file pretends to hold is never read
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(
            errno.EFBIG, f"larger than {most >> 20} MiB" if most >> 20 else f"larger than {most} bytes", str(path)
        )
    return content
