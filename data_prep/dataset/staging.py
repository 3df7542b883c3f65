"""A copy of a dataset folder on the node's own disk, made once a node and checked, for storage that nodes share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.dataset.manifest import FILE, Dataset, open_dataset, read_manifest
from data_prep.errors import UserError

_BLOCK_BYTES = 8 << 20


def open_here(folder: Path, local: Path | None) -> Dataset:
    """Open a dataset folder, from its copy below `local` where one is asked for; see `stage`."""
    return open_dataset(folder) if local is None else stage(folder, local)


def stage(folder: str | os.PathLike[str], local: str | os.PathLike[str]) -> Dataset:
    """The data set in `folder`, opened from its copy below `local`.

    The copy's folder is named by the data's hash. The first process of a node to ask makes it, the others wait for it;
    what is there already is used, after the same checks as any dataset folder. Every file is hashed as it is copied,
    so that shared storage is read once a node.

    Args:
        folder: dataset folder on shared storage.
        local: folder on the node's own disk, made where it is missing.

    Raises:
        UserError: not a dataset folder, a file that differs from its manifest, or no room for the copy.
    """
    folder, local = Path(folder), Path(local)
    manifest = read_manifest(folder)
    copy = local / manifest.data_hash
    try:
        local.mkdir(parents=True, exist_ok=True)
        with _locked(local / f".{manifest.data_hash}.lock"):
            if copy.exists():
                try:
                    if read_manifest(copy) == manifest:
                        return open_dataset(copy)
                except UserError:
                    pass  # damaged, or half deleted by whoever cleans this disk
                shutil.rmtree(copy)
            _make(folder, Dataset(copy, manifest))
    except OSError as error:
        raise UserError(
            f"the data set cannot be copied ({error.strerror or error})",
            where=error.filename or local,
            hint="choose another compute.stage, or leave it out to read the shared folder",
        ) from error
    return open_dataset(copy)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this node at a time; the lock goes with its process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(source: Path, copy: Dataset) -> None:
    needed, free = sum(r.bytes for r in copy.manifest.files.values()), shutil.disk_usage(copy.folder.parent).free
    if needed > free:
        raise UserError(
            f"the data set takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=copy.folder.parent,
            hint="make room, or choose another compute.stage",
        )
    partial = copy.folder.with_name(f".{copy.folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        partial.mkdir()
        for name, record in copy.manifest.files.items():
            if _copy(source / name, partial / name) != record.sha256:
                raise UserError(
                    "the file's sha256 is not that of the manifest: damaged, edited or of another data set",
                    where=source / name,
                    hint="prepare the data set again",
                )
        shutil.copyfile(source / FILE, partial / FILE)
        partial.rename(copy.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> str:
    """Copy a file; returns the hex sha256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
