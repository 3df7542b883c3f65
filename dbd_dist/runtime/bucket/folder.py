"""Which folder of this machine stands for an address, and runs that are fetched into one to be read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from data_prep.io import hashcache
from data_prep.io.hashes import sha256_json
from dbd_dist.runtime.bucket.address import address_of, endpoint_of, shown

if TYPE_CHECKING:
    from dbd_dist.runtime.mirror import Mirror

VARIABLE = "DBD_STAGING"
"""Names the folder below which runs are staged; for several nodes, one that all share."""


def staging_root() -> Path:
    """Where runs are staged: $DBD_STAGING, else in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().resolve()
    return ((hashcache.folder() or Path(tempfile.gettempdir()) / "dbd-dist") / "storage").resolve()


def is_for_one_node(folder: Path) -> bool:
    """Is a folder staged where, for all we know, no other node sees it?"""
    return not os.environ.get(VARIABLE) and folder.resolve().is_relative_to(staging_root())


def check_torchrun() -> None:
    """Refuse ranks of several nodes without a folder that all share.

    Raises:
        UserError
    """
    world, here = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world != here and not os.environ.get(VARIABLE):
        raise UserError(
            "the run is staged on one node's disk, and torchrun has ranks on others",
            where="--storage",
            hint=f"name a folder that all nodes share with {VARIABLE}",
        )


def staging_folder(address: str) -> Path:
    """The folder that stands for a storage's address: one each, also for commands to come.

    Other options after ? than the server say how to reach it, and change nothing.
    """
    plain = shown(address).partition("?")[0]
    return staging_root() / sha256_json([plain, endpoint_of(address)])[:16]


def fetch_run(address: str) -> Path:
    """Copy what a report or an evaluation reads of a run into a folder of this machine, anew each time.

    Args:
        address: of the run: its storage's, a slash, and its name.

    Returns:
        The folder, called as the run is.

    Raises:
        UserError: the store cannot be used, or there is no such run.
    """
    from dbd_dist.runtime.bucket.store import CHECK_LIMIT_S, within

    home = staging_folder(address)
    folder = home / Path(address.partition("?")[0]).name
    make_folder(home)
    mirror = within(CHECK_LIMIT_S, lambda: _mirror_of_run(address, folder), address)
    if not mirror.fetch(folder, pattern="run.json", replace=True):
        raise UserError("there is no such run", where=shown(address), expected="a folder with a run.json")
    names = {path.name for path in mirror.fetch(folder, pattern="*", replace=True)}
    for path in folder.iterdir():
        if path.name not in names and path.is_file():  # of an earlier state of the run
            path.unlink()
    return folder


def _mirror_of_run(address: str, folder: Path) -> Mirror:
    """The mirror whose root is the run itself, after one answer of the store."""
    from dbd_dist.runtime.bucket.store import list_place, open_address
    from dbd_dist.runtime.mirror import Mirror

    place = open_address(address, request_s=5.0, attempts=2)
    list_place(place)
    folder.mkdir(exist_ok=True)
    return Mirror(address, folder, flag="run")


def local_folder(run: str | os.PathLike[str]) -> Path:
    """A run's folder: itself, or the one that its address is fetched into (`fetch_run`)."""
    address = address_of(run)
    return Path(run) if address is None else fetch_run(address)


def make_folder(folder: Path) -> None:
    """Make a staging folder, for this user alone.

    Raises:
        UserError
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        what = f"the staging folder cannot be made ({error.strerror})"
        raise UserError(what, where=folder, hint=f"name another with {VARIABLE}") from error
