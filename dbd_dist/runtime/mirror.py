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

log = logging.getLogger(__name__)
_LOCAL = fs.LocalFileSystem()


class Mirror:
    """Copies of files below `root` in a file system that pyarrow knows (file:, s3:, gs:, abfs:, hdfs:).

    Copies are a backup: one that fails is logged and tried again with the next checkpoint; it never ends a run.

    Args:
        uri: where copies go.
        root: the storage whose files are copied.

    Raises:
        UserError: the address is none that pyarrow can reach.
    """

    def __init__(self, uri: str, root: Path):
        self.uri, self._root = uri, root.resolve()
        try:
            system, self._base = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            expected = "an absolute address such as s3://BUCKET/FOLDER or file:///FOLDER"
            raise self._error("reached", error, expected=expected) from error
        self._system = fs.SubTreeFileSystem(self._base, system)

    def check(self) -> None:
        """Write a small file and remove it.

        Raises:
            UserError: the place cannot be written.
        """
        mark = f".mark-{uuid.uuid4().hex}"
        try:
            self._system.base_fs.create_dir(self._base, recursive=True)
            with self._system.open_output_stream(mark) as file:
                file.write(b"dbd")
            self._system.delete_file(mark)
        except (OSError, pa.ArrowException) as error:
            hint = "check the address and the right to write there, or leave it out"
            raise self._error("written", error, hint=hint) from error

    def put(self, path: Path) -> bool:
        """Copy one file there, atomically; returns whether that succeeded."""
        target = self._target(path)
        try:
            self._system.create_dir(str(PurePosixPath(target).parent), recursive=True)
            _copy(_LOCAL, str(path), self._system, target)
        except (OSError, pa.ArrowException) as error:
            log.warning("%s was not copied to %s (%s)", path, self.uri, error)
            return False
        return True

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
        return path.resolve().relative_to(self._root).as_posix()

    def _error(self, verb: str, error: Exception, *, expected: str | None = None, hint: str | None = None) -> UserError:
        what = f"{self.uri!r} cannot be {verb} ({str(error).splitlines()[0]})"
        return UserError(what, where="compute.mirror", expected=expected, hint=hint)


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
