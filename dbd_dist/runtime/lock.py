"""One driver at a time for what a command works on: a run, a sweep, an artefact.

`flock` on a small file, held while the command runs. The kernel lets go of it when its process ends, however that
happens, so that nothing has to be cleaned up after a kill. On NFS from version 4 (and Linux's version 3 with its lock
daemon) the server keeps it, and it holds between machines. Lustre mounted with ``localflock`` and some FUSE file
systems accept the call and keep out processes of the same machine only.
"""

from __future__ import annotations

import errno
import fcntl
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

from data_prep.errors import UserError

FILE = ".lock"
"""Name of the lock in a folder of its own."""

_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS}
_held: set[int] = set()


def _let_go_in_child() -> None:
    """A forked child shares the lock until its copy of the descriptor is closed: it would outlive the driver."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)  # started programs do not get it: Python opens with O_CLOEXEC


@contextmanager
def held(path: Path, what: str, *, flag: str = "--name") -> Iterator[None]:
    """Hold the lock `path` while the body runs, and remove its file afterwards.

    Where the storage has no locks (Lustre without ``flock``, NFS without a lock daemon), warn and go on: a lock made of
    files and times would be wrong whenever a driver is suspended or clocks differ, and would keep a run locked after a
    kill.

    Args:
        path: the lock file; its folder is made where it is missing.
        what: that is locked, for messages: the folder of the run, sweep or artefact.
        flag: of the command, that chooses another one.

    Raises:
        UserError: another process holds it, or the file cannot be made.
    """
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    except OSError as error:
        raise UserError(
            f"cannot be locked ({error.strerror or error})", where=path, hint="get the right to write there, or "
            f"choose another {flag}"
        ) from error  # fmt: skip
    if descriptor is None:
        raise UserError(
            f"another process is at work on it: {_holder(path)}",
            where=what,
            expected="one at a time",
            hint=f"wait for it, end it, or choose another {flag}",
        )
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: see _acquire
        if made:  # and nothing else came
            with suppress(OSError):
                path.parent.rmdir()
        if descriptor in _held:  # not in a child
            _held.discard(descriptor)
            os.close(descriptor)


def clear(path: Path) -> None:
    """Remove the file that a killed holder has left; nothing while it is held."""
    with suppress(UserError):
        if path.exists():
            with held(path, ""):
                pass


def _acquire(path: Path) -> int | None:
    """The descriptor of the locked file; None where another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(
                f"{path.parent}: the storage has no file locks ({error.strerror}); nothing keeps a second command from "
                "working on the same",
                stacklevel=4,
            )
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk: only the message to others has less to say
                _describe(path)
            return descriptor
        os.close(descriptor)  # its holder removed it after we had opened it: try the file that is there now


def _is_at(path: Path, descriptor: int) -> bool:
    """Is an open file still the one of that name? Opens it, since NFS answers `stat` from a cache."""
    try:
        now = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        ours, theirs = os.fstat(descriptor), os.fstat(now)
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
    finally:
        os.close(now)


def _describe(path: Path) -> None:
    """Say who holds it. Closed at once: NFS sends it to readers on other machines then."""
    text = json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
        }
    )
    path.write_text(text + "\n")


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        command = " ".join(map(str, values["command"]))
        return f"process {values['pid']} on {values['host']} since {values['since']} ({command[:200]})"
    except (OSError, ValueError, KeyError, TypeError):  # about to be written, or gone again
        return "it has just started or ended"
