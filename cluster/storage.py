"""Where runs are kept: a local folder, a mounted share, or an object store."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ClusterError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SCHEMES = ("s3", "gs", "gcs", "file")
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "glusterfs",
    "9p",
    "afs",
    "virtiofs",
}


@dataclass(frozen=True)
class Storage:
    uri: str  # as Ray Train takes it for storage_path: an absolute path, or a URI with its scheme
    local: Path | None  # None for an object store

    @property
    def shared(self) -> bool:
        """Whether its kind reaches every node. A local folder may be shared by means that this cannot see."""
        return self.local is None or file_system(self.local) in NETWORK_FILE_SYSTEMS

    def open(self) -> tuple[FileSystem, str]:
        """The pyarrow file system and the path within it."""
        from pyarrow.fs import FileSystem, LocalFileSystem

        if self.local is not None:
            return LocalFileSystem(), str(self.local)
        try:
            return FileSystem.from_uri(self.uri)
        except (OSError, ValueError, NotImplementedError) as error:
            raise ClusterError(
                f"The storage cannot be opened ({_first_line(error)})",
                where=self.uri,
                fix="check the bucket's name, its region, and the credentials in the environment",
            ) from error


def resolve(path: str | PathLike[str]) -> Storage:
    """A user's storage path, made absolute: Ray's workers run in other working directories.

    Nothing is written.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ClusterError("The storage path is empty", where="--storage", allowed="a folder, or s3://BUCKET/FOLDER")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(/*)", text)
    scheme, slashes = found.groups() if found else ("", "")
    if not scheme or (slashes == "" and Path(text).exists()):
        return _local(Path(text))
    if scheme not in SCHEMES:
        raise ClusterError(
            f"Storage of the kind {scheme!r} is not known",
            where=text,
            allowed="a folder, or " + ", ".join(f"{known}://..." for known in SCHEMES),
        )
    if scheme == "file":
        if slashes != "///":
            raise ClusterError("A file URI holds an absolute path", where=text, allowed="file:///FOLDER")
        return _local(Path(text.removeprefix("file://")))
    if slashes != "//" or not text.removeprefix(f"{scheme}://").strip("/"):
        raise ClusterError("The storage names no bucket", where=text, allowed=f"{scheme}://BUCKET/FOLDER")
    return Storage(text.rstrip("/"), None)


def check_writable(storage: Storage) -> None:
    """Write a small file, read it back, remove it and the folders made for it; else ClusterError."""
    leave_mark(storage).remove()


@dataclass(frozen=True)
class Mark:
    """A file with random content: who reads the same bytes sees the same storage."""

    storage: Storage
    name: str
    content: bytes
    found: Path | None  # the nearest folder that was there before

    def seen(self) -> bool:
        system, folder = self.storage.open()
        try:
            with system.open_input_stream(f"{folder}/{self.name}") as stream:
                return stream.read() == self.content
        except OSError:
            return False

    def remove(self) -> None:
        system, folder = self.storage.open()
        system.delete_file(f"{folder}/{self.name}")
        made = self.storage.local
        while made is not None and made != self.found and not any(made.iterdir()):
            made.rmdir()
            made = made.parent


def leave_mark(storage: Storage) -> Mark:
    system, folder = storage.open()
    found = None if storage.local is None else _existing(storage.local)
    mark = Mark(storage, f".mark-{uuid.uuid4().hex}", uuid.uuid4().bytes, found)
    try:
        system.create_dir(folder, recursive=True)
        with system.open_output_stream(f"{folder}/{mark.name}") as stream:
            stream.write(mark.content)
    except OSError as error:
        raise ClusterError(
            f"The storage cannot be written ({_first_line(error)})",
            where=storage.uri,
            fix="choose another folder, or get the right to write there",
        ) from error
    if not mark.seen():
        raise ClusterError("The storage does not give back what was written", where=storage.uri)
    return mark


def free_bytes(storage: Storage) -> int | None:
    """Free space for an ordinary user; None for an object store, which has no bound."""
    return None if storage.local is None else shutil.disk_usage(_existing(storage.local)).free


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


def _local(path: Path) -> Storage:
    path = path.expanduser().absolute()
    above = _existing(path)
    if not above.is_dir():
        raise ClusterError(f"{above} is a file, not a folder", where=path, allowed="a folder, existing or not")
    return Storage(str(path), path)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
