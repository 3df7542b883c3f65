"""One command at a time for a run, a sweep, an artefact or a data set.

`filelock` holds `flock` on a small file while the command runs. The kernel releases it when the process ends, so
nothing has to be cleaned up after a kill; forked children close their copy, started programs never get one. NFS keeps
the lock on the server from version 4 on. Lustre mounted with ``localflock`` and some FUSE file systems accept the call
and lock out processes of the same machine only.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.errors import UserError
from data_prep.io.atomic import becomes, remove_stale

FILE = ".lock"
"""Name of the lock in a folder of its own."""

_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
_TIMEOUT_S = 0.2
"""Room for a few tries: the file that was opened may be the one that its last holder has just removed."""


class InUse(UserError):
    """Another process holds the lock."""


@contextmanager
def held(path: Path, what: str, *, flag: str = "--name", wait: bool = False) -> Iterator[bool]:
    """Hold the lock `path` while the body runs, and remove its file afterwards. Gives whether it is held.

    Where the storage has no locks (Lustre without ``flock``, NFS without a lock daemon), warn and run without. A lock
    made of files and times is no substitute: it fails when a driver is suspended or clocks differ, and outlives a kill.

    Args:
        path: the lock file; its folder is created if it is missing.
        what: that is locked, for messages: the folder of the run, sweep, artefact or data set.
        flag: of the command, that chooses another one.
        wait: for whoever holds it, with a note on stderr.

    Raises:
        UserError: another process holds it (`InUse`), or the file cannot be written.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    # the soft lock that filelock would fall back to is a lock made of files
    lock = FileLock(path, timeout=_TIMEOUT_S, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, what, flag, wait)
    except BaseException:
        _remove_empty(missing)
        raise
    with suppress(OSError):  # a full disk: the message to others says less
        _describe(path)
    ours = _identity(path)
    try:
        yield lock.is_locked
    finally:
        if _identity(path) == ours:  # the folder may have gone, and another process have locked a new one
            with suppress(OSError):
                path.unlink()  # before the release: the next holder's file must stay
        _remove_empty(missing)
        lock.release()


def _acquire(lock: FileLock, path: Path, what: str, flag: str, wait: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            if not wait:
                raise
            print(f"{what}: waiting, another process is at work on it: {_holder(path)}", file=sys.stderr, flush=True)
            lock.acquire(timeout=-1)
    except Timeout as error:
        raise InUse(
            f"another process is at work on it: {_holder(path)}",
            where=what,
            expected="one at a time",
            hint=f"wait for it, end it, or choose another {flag}",
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            hint = f"get the right to write there, or choose another {flag}"
            why = "Not a directory" if isinstance(error, FileExistsError) else error.strerror or error
            raise UserError(f"cannot be locked ({why})", where=what, hint=hint) from error
        warnings.warn(
            f"{path.parent}: the storage has no file locks ({error.strerror}); nothing keeps a second command from "
            "working on the same",
            stacklevel=4,
        )


def _remove_empty(folders: list[Path]) -> None:
    """The innermost first; what holds anything stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def remove_dead(folder: Path) -> None:
    """Remove folders that killed processes were writing directly in `folder`: those whose lock, ``.NAME.lock`` beside
    them, nobody holds. Where there are no locks, nothing tells the dead from the living: all stay."""
    names = {name for path in folder.glob(".*.partial") if path.is_dir() and (name := becomes(path)) is not None}
    for name in sorted(names):
        lock = folder / f".{name}.lock"
        with suppress(UserError), held(lock, str(folder / name)) as is_held:
            if is_held:
                remove_stale(folder, name)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def clear(path: Path) -> None:
    """Remove the file that a killed holder has left; nothing while it is held."""
    if path.exists():
        with suppress(UserError), held(path, ""):
            pass


def _describe(path: Path) -> None:
    """Say who holds it. Closed at once: NFS then shows it to other machines."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": sys.argv}
    path.write_text(json.dumps(holder) + "\n")


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        command = " ".join(map(str, values["command"]))
        return f"process {values['pid']} on {values['host']} since {values['since']} ({command[:200]})"
    except (OSError, ValueError, KeyError, TypeError):  # about to be written, or already removed
        return "it has just started or ended"
