"""Atomic writes: at any moment, a reader finds the old file or folder, or the whole new one.

What is being written has the temporary name ``.NAME.XXXXXXXX.partial`` beside its place (eight hexadecimal digits) and
is renamed when it is whole. What an error interrupts is removed; what a killed process leaves is recognised by its
name, see `remove_stale`.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.partial")


def temporary(path: Path) -> Path:
    """A new temporary name beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def replacing(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[Path]:
    """Write a file: gives a temporary path, which becomes `path` when the block ends without an error.

    Args:
        path: of the file; its folder exists.
        sync: wait until the content is on the disk, where a crash of the machine must not leave an empty file.

    Raises:
        OSError: no room, no permission, or the storage is gone; `path` is as it was.
    """
    partial = temporary(Path(path))
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):  # renamed, or never there; where storage is gone another error says so
            partial.unlink()


def write_bytes(path: str | os.PathLike[str], *parts: bytes | memoryview, sync: bool = False) -> None:
    """Write a file whole or not at all, from parts that follow each other; as `replacing`."""
    with replacing(path, sync=sync) as partial, partial.open("wb") as file:
        for part in parts:
            file.write(part)


def write_text(path: str | os.PathLike[str], text: str, *, sync: bool = False) -> None:
    """Write a UTF-8 file whole or not at all; as `replacing`."""
    write_bytes(path, text.encode(), sync=sync)


@contextmanager
def replacing_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder: gives a new one to fill, which becomes `path` when the block ends without an error.

    Folders above it are made, and removed again where that left them empty.

    Args:
        path: of the folder.
        overwrite: replace what is there; otherwise only an empty folder is.

    Raises:
        OSError: no room, no permission, or `path` is taken; what was there stays.
    """
    path = Path(path)
    partial, old = temporary(path), temporary(path)
    missing = [folder for folder in partial.parents if not os.path.lexists(folder)]
    try:
        partial.mkdir(parents=True)
        yield partial
        if overwrite and os.path.lexists(path):
            path.rename(old)
        try:
            partial.rename(path)
        except OSError:
            if os.path.lexists(old):
                old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # something is in it by now
                folder.rmdir()


def becomes(path: Path) -> str | None:
    """The name that a temporary file or folder gets when it is whole; None for whatever is called otherwise."""
    match = _TEMPORARY.fullmatch(path.name)
    return None if match is None else match[1]


def remove_stale(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove what a killed process was writing directly in `folder`; only for the one process that writes there.

    Hidden files of other programs have other names and stay.

    Args:
        name: only what was to become this file or folder; without it whatever was being written.
    """
    for path in Path(folder).glob(".*.partial"):
        if becomes(path) is None or name not in (None, becomes(path)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # the storage is gone or read-only: whatever is written next says so
                path.unlink()
