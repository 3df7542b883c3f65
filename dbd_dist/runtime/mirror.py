"""A second place for a run's states: another disk, a mounted share, or an object store.

What is below a storage's folder has the same path below the mirror. Storage comes back from it file by file: what is
missing here and is there is fetched when a run starts.
"""

from __future__ import annotations

import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import UserError

log = logging.getLogger(__name__)


class Mirror:
    """Copies of files below `root` in a file system that pyarrow knows (file:, s3:, gs:, abfs:, hdfs:).

    Copies are a second string: one that fails is told of and tried again with the next state; it never ends a run.

    Args:
        uri: where copies go.
        root: the storage whose files are copied.

    Raises:
        UserError: the address is none that pyarrow can reach.
    """

    def __init__(self, uri: str, root: Path):
        self._root = root.resolve()
        try:
            system, base = fs.FileSystem.from_uri(uri)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{uri!r} cannot be reached ({str(error).splitlines()[0]})",
                where="compute.mirror",
                expected="an absolute address such as s3://BUCKET/FOLDER or file:///FOLDER",
            ) from error
        self._system: Any = system
        self._base = base.rstrip("/")
        self.uri = uri

    def _there(self, path: Path) -> str:
        return str(PurePosixPath(self._base) / path.resolve().relative_to(self._root).as_posix())

    def check(self) -> None:
        """Write a small file and remove it.

        Raises:
            UserError: the place cannot be written.
        """
        mark = f"{self._base}/.mark-{uuid.uuid4().hex}"
        try:
            self._system.create_dir(self._base, recursive=True)
            with self._system.open_output_stream(mark) as file:
                file.write(b"dbd")
            self._system.delete_file(mark)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.uri!r} cannot be written ({str(error).splitlines()[0]})",
                where="compute.mirror",
                hint="check the address and the right to write there, or leave it out",
            ) from error

    def put(self, path: Path) -> bool:
        """Copy one file there; returns whether that succeeded.

        An object store shows it when it is whole; elsewhere it is renamed into place.
        """
        there = self._there(path)
        aside = str(PurePosixPath(there).with_name(f".{path.name}.{uuid.uuid4().hex[:8]}"))
        try:
            self._system.create_dir(str(PurePosixPath(there).parent), recursive=True)
            fs.copy_files(str(path), aside, source_filesystem=fs.LocalFileSystem(), destination_filesystem=self._system)
            self._system.move(aside, there)
        except (OSError, pa.ArrowException) as error:
            log.warning("%s was not copied to %s (%s)", path, self.uri, error)
            return False
        return True

    def remove(self, path: Path) -> None:
        """Remove the copy of a file."""
        with suppress(OSError, pa.ArrowException):  # never copied, or out of reach: a copy too many harms nobody
            self._system.delete_file(self._there(path))

    def fetch(self, folder: Path, *, pattern: str, replace: bool = False) -> list[Path]:
        """Copy what is directly below the mirrored `folder` and missing here; returns what was fetched.

        Args:
            pattern: of file names.
            replace: files that are here too.

        Raises:
            UserError: the mirror cannot be read.
        """
        selector = fs.FileSelector(self._there(folder), allow_not_found=True)
        fetched = []
        try:
            for info in self._system.get_file_info(selector):
                here = folder / PurePosixPath(info.path).name
                if info.type != fs.FileType.File or not PurePosixPath(info.path).match(pattern):
                    continue
                if here.exists() and not replace:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                aside = here.with_name(f".{here.name}.{uuid.uuid4().hex[:8]}")
                try:
                    fs.copy_files(
                        info.path, str(aside), source_filesystem=self._system,
                        destination_filesystem=fs.LocalFileSystem(),
                    )  # fmt: skip
                    os.replace(aside, here)
                finally:
                    aside.unlink(missing_ok=True)
                fetched.append(here)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.uri!r} cannot be read ({str(error).splitlines()[0]})", where="compute.mirror",
                hint="bring it back, or leave it out",
            ) from error  # fmt: skip
        return fetched
