"""Where runs are kept: a local folder, or one that all machines mount."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from data_prep.errors import UserError


def resolve(path: str | PathLike[str]) -> Path:
    """A user's storage folder, made absolute: Ray's workers run in other working directories.

    Nothing is written.

    Raises:
        UserError: the address of an object store, or a file.
    """
    text = os.fspath(path)
    if not text.strip():
        raise UserError("The storage path is empty", where="--storage", expected="a folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        # files are renamed into place and locked, which object stores cannot do
        raise UserError(
            "The storage is not a folder",
            where=text,
            expected="a folder that all machines see",
            hint="`dbd train` alone keeps runs in a bucket: mount the bucket or the share, and name the folder",
        )
    folder = Path(text).expanduser().absolute()
    try:
        above = _existing(folder)
    except OSError as error:
        what = f"The storage cannot be made ({error.strerror})"
        raise UserError(what, where=folder, expected="a folder") from error
    if not above.is_dir():
        raise UserError(f"{above} is a file, not a folder", where=folder, expected="a folder, existing or not")
    return folder


def check_writable(folder: Path) -> None:
    """Write a small file, read it back, remove it and the folders made for it; else UserError."""
    leave_mark(folder).remove()


@dataclass(frozen=True)
class Mark:
    """A file with random content: who reads the same bytes sees the same storage."""

    folder: Path
    name: str
    content: bytes
    found: Path  # the nearest folder that was there before

    def seen(self) -> bool:
        try:
            return (self.folder / self.name).read_bytes() == self.content
        except OSError:
            return False

    def remove(self) -> None:
        (self.folder / self.name).unlink()
        made = self.folder
        while made != self.found and not any(made.iterdir()):
            made.rmdir()
            made = made.parent


def leave_mark(folder: Path) -> Mark:
    """Write a mark; UserError where that cannot be done."""
    mark = Mark(folder, f".mark-{uuid.uuid4().hex}", uuid.uuid4().bytes, _existing(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / mark.name).write_bytes(mark.content)
    except OSError as error:
        raise UserError(
            f"The storage cannot be written ({error.strerror or error})",
            where=folder,
            hint="choose another folder, or get the right to write there",
        ) from error
    if not mark.seen():
        raise UserError("The storage does not give back what was written", where=folder)
    return mark


def free_bytes(folder: Path) -> int:
    """Free space for an ordinary user."""
    return shutil.disk_usage(_existing(folder)).free


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds a path ("ext4", "nfs4"), or "" where the system does not tell.

    Args:
        mounts: the text of /proc/mounts; read when left out.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return ""
    path = _existing(path) if path.is_absolute() else path
    kind, depth = "", -1
    for line in mounts.splitlines():
        _, point, of_type, *_ = line.split(" ")
        point = Path(point.replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides an earlier one
            kind, depth = of_type.removeprefix("fuse."), len(point.parts)
    return kind


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())
