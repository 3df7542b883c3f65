"""One run at a time trains a stage that several need: the others wait for what it leaves in the store.

A lease is `flock` on a file in the stage's folder, as in `lock`: the kernel frees it with the process, so that a run
that dies gives it up, and one of those that wait takes over. Where the storage has no locks, every run trains for
itself.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from dbd_dist.distributed.world import World
from dbd_dist.runtime import logs, watchdog

FILE = ".lease"
POLL_S = 0.5


@contextmanager
def held(
    path: Path,
    *,
    holder: str,
    world: World,
    finished: Callable[[], bool],
    between: Callable[[str], None] = lambda holder: None,
) -> Iterator[bool]:
    """Wait until the stage is there or nobody else trains it; every rank calls it, rank 0 holds the lease.

    Args:
        path: the lease file.
        holder: names this run, for others.
        finished: whether the stage is in the store; called on rank 0.
        between: called on every rank while waiting, with who trains it; may raise to end the wait.

    Yields:
        Whether this run is to train the stage; False: it is in the store.
    """
    lock = FileLock(path, timeout=0, thread_local=False, fallback_to_soft=False)
    began, waited = time.monotonic(), False
    while True:
        state, other = world.broadcast(_try(lock, path, holder, finished) if world.is_main else None)
        if state != "wait":
            break
        if not waited:
            logs.event("waits for a stage", stage=path.parent.name, trained_by=other)
            waited = True
        watchdog.beat()
        between(other)
        time.sleep(POLL_S)
    if waited:
        logs.event("waited for a stage", stage=path.parent.name, seconds=round(time.monotonic() - began, 2))
    try:
        yield state == "train"
    finally:
        if lock.is_locked:
            _release(lock, path)


def _try(lock: FileLock, path: Path, holder: str, finished: Callable[[], bool]) -> tuple[str, str]:
    """("there" | "train" | "wait", who trains it)."""
    if finished():
        return "there", ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (Timeout, FileNotFoundError):  # of the folder, which its last holder has just removed
        return "wait", _holder(path)
    except OSError:  # no locks there, or no room: `lock.held` has warned of the one, saving the stage tells the other
        return "train", ""
    if finished():  # between the first look and the lock
        _release(lock, path)
        return "there", ""
    with suppress(OSError):
        path.write_text(json.dumps({"run": holder, "pid": os.getpid()}))
    return "train", ""


def _release(lock: FileLock, path: Path) -> None:
    with suppress(OSError):
        path.unlink()  # before the release: the next holder's file must stay
        path.parent.rmdir()  # where nothing was stored
    lock.release()


def _holder(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
