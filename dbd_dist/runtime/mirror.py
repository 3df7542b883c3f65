"""A second place for a run's checkpoints: another disk, a mounted share, or an object store.

What is below a storage's folder has the same path below the mirror. A run that starts fetches what is missing in its
storage, file by file.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import UserError
from data_prep.io.atomic import temporary
from dbd_dist.runtime.bucket.address import shown
from dbd_dist.runtime.bucket.store import OBJECT_STORES, open_address

log = logging.getLogger(__name__)
_LOCAL = fs.LocalFileSystem()


class Mirror:
    """Copies of files below `root` in a file system that pyarrow knows (file:, s3:, gs:, abfs:, hdfs:).

    Copies are a backup: one that fails is logged and tried again with the next checkpoint; it never ends a run.

    Args:
        uri: where copies go.
        root: the storage whose files are copied.
        flag: that named the address, for messages.

    Raises:
        UserError: the address is none that pyarrow can reach.
    """

    def __init__(self, uri: str, root: Path, *, flag: str = "compute.mirror"):
        self.uri, self._root, self._flag = shown(uri), root.resolve(), flag
        try:
            place = open_address(uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            expected = "an absolute address such as s3://BUCKET/FOLDER or file:///FOLDER"
            raise self._error("reached", error, expected=expected) from error
        self._base, self._has_folders = place.base, place.system.type_name not in OBJECT_STORES
        self._system = fs.SubTreeFileSystem(self._base, place.system)

    def check(self) -> None:
        """Write a small file and remove it.

        Raises:
            UserError: the place cannot be written.
        """
        mark = f".mark-{uuid.uuid4().hex}"
        try:
            if self._has_folders:
                self._system.base_fs.create_dir(self._base, recursive=True)
            with self._system.open_output_stream(mark) as file:
                file.write(b"dbd")
            self._system.delete_file(mark)
        except (OSError, pa.ArrowException) as error:
            hint = "check the address and the right to write there, or leave it out"
            raise self._error("written", error, hint=hint) from error

    def put(self, path: Path) -> bool:
        """Copy one file there, atomically; returns whether that succeeded."""
        try:
            self.send(path)
        except (OSError, pa.ArrowException) as error:
            log.warning("%s was not copied to %s (%s)", path, self.uri, error)
            return False
        return True

    def send(self, path: Path) -> None:
        """Copy one file there, atomically.

        Raises:
            OSError, pa.ArrowException: that failed; what was there is there still.
        """
        target = self._target(path)
        if not self._has_folders:  # what is sent appears when it is whole
            fs.copy_files(str(path), target, source_filesystem=_LOCAL, destination_filesystem=self._system)
            return
        self._system.create_dir(str(PurePosixPath(target).parent), recursive=True)
        _copy(_LOCAL, str(path), self._system, target)

    def sizes(self, folder: Path) -> dict[Path, int]:
        """The files below the mirrored `folder` that are not empty: their paths here, and their bytes there.

        Azure shows a file that is being sent as an empty one.

        Raises:
            UserError: the mirror cannot be read.
        """
        selector = fs.FileSelector(self._target(folder), recursive=True, allow_not_found=True)
        try:
            infos = self._system.get_file_info(selector)
        except (OSError, pa.ArrowException) as error:
            raise self._error("read", error, hint="bring it back") from error
        return {self._root / info.path: info.size for info in infos if info.is_file and info.size}

    def remove(self, path: Path) -> None:
        """Remove the copy of a file."""
        with suppress(OSError, pa.ArrowException):  # never copied, or out of reach: a copy too many does no harm
            self._system.delete_file(self._target(path))

    def fetch(self, folder: Path, *, pattern: str, replace: bool = False) -> list[Path]:
        """Copy what is directly below the mirrored `folder` and missing here; returns what was fetched.

        Args:
            pattern: of file names.
            replace: files that are here too.

        Raises:
            UserError: the mirror cannot be read.
        """
        selector = fs.FileSelector(self._target(folder), allow_not_found=True)
        fetched = []
        try:
            for info in self._system.get_file_info(selector):
                here = folder / info.base_name
                if not info.is_file or not here.match(pattern) or (here.exists() and not replace):
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                _copy(self._system, info.path, _LOCAL, str(here))
                fetched.append(here)
        except (OSError, pa.ArrowException) as error:
            raise self._error("read", error, hint="bring it back, or leave it out") from error
        return fetched

    def _target(self, path: Path) -> str:
        path = path.resolve()
        return "" if path == self._root else path.relative_to(self._root).as_posix()

    def _error(self, verb: str, error: Exception, *, expected: str | None = None, hint: str | None = None) -> UserError:
        what = f"{self.uri!r} cannot be {verb} ({(str(error).splitlines() or ['no message'])[0]})"
        return UserError(what, where=self._flag, expected=expected, hint=hint)


def _copy(source: fs.FileSystem, path: str, target: fs.FileSystem, to: str) -> None:
    """Copy under a temporary name, then rename, so that a reader finds a whole file or none."""
    partial = str(temporary(Path(to)))
    try:
        fs.copy_files(path, partial, source_filesystem=source, destination_filesystem=target)
        target.move(partial, to)
    except (OSError, pa.ArrowException):
        with suppress(OSError, pa.ArrowException):
            target.delete_file(partial)
        raise
