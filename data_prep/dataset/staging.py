"""A copy of a dataset folder on the node's own disk, made once a node and checked, for storage that nodes share."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from filelock import FileLock

from data_prep.dataset.manifest import FILE, Dataset, Manifest, open_dataset, read_manifest
from data_prep.errors import UserError
from data_prep.io.atomic import remove_stale, replacing_folder

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
        with FileLock(local / f".{manifest.data_hash}.lock"):  # the lock goes with its process, however that ends
            if copy.exists():
                try:
                    if read_manifest(copy) == manifest:
                        return open_dataset(copy)
                except UserError:
                    pass  # damaged, or half deleted by whatever cleans this disk
                shutil.rmtree(copy)
            remove_stale(local, copy.name)
            with replacing_folder(copy) as partial:
                _copy_all(folder, partial, manifest)
    except OSError as error:
        raise UserError(
            f"the data set cannot be copied ({error.strerror or error})",
            where=error.filename or local,
            hint="choose another compute.stage, or leave it out to read the shared folder",
        ) from error
    return open_dataset(copy)


def _copy_all(source: Path, target: Path, manifest: Manifest) -> None:
    needed, free = sum(r.bytes for r in manifest.files.values()), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"the data set takes {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
            where=target.parent,
            hint="make room, or choose another compute.stage",
        )
    for name, record in manifest.files.items():
        if _copy(source / name, target / name) != record.sha256:
            raise UserError(
                "the file's sha256 is not that of the manifest: damaged, edited or of another data set",
                where=source / name,
                hint="prepare the data set again",
            )
    shutil.copyfile(source / FILE, target / FILE)


def _copy(source: Path, target: Path) -> str:
    """Copy a file; returns the hex sha256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while block := reading.read(_BLOCK_BYTES):
            digest.update(block)
            writing.write(block)
    return digest.hexdigest()
