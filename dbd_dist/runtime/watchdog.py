"""Finds a training process that hangs: leaves the stacks of its threads in RUN/stalls/, and ends it.

Whatever makes progress calls `beat`: each step of a stage, each batch of a pass over images. When no beat has come for
as long as a run allows (`compute.stall_s`), a thread of the watchdog writes the stacks and ends the process with
`EXIT_CODE`; Ray Train then starts the workers again from the last checkpoint. Where one rank hangs, the others wait for
it in a collective: their watchdogs find the same at about the same time, and each leaves its own file before the first
one goes.

C code that never releases the GIL would stop that thread as well. For this case `faulthandler` is armed with
a little more time: its own thread needs no GIL. All it can do is to write the stacks to a file that was opened before
(`logs/.rankR.stacks`) and to end the process with code 1; `collect` then moves the file to the others.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from data_prep.errors import UserError
from dbd_dist.runtime import logs

FOLDER = "stalls"
EXIT_CODE = 70
"""Of a process that was ended because it hung."""

START_FACTOR = 4
"""How much longer than between two steps it may take to the first one: the data set is read, code is compiled."""

_PID = re.compile(r"^pid +(\d+)$", re.MULTILINE)

Tick = Callable[[str, int, int, int, int], None]
_current: Watchdog | None = None


class StalledError(UserError):
    """A run was ended because it hung; the message says where the stacks are."""

    exit_code = EXIT_CODE

    @classmethod
    def of(cls, folder: Path, what: str, stacks: object) -> StalledError:
        return cls(
            f"{what}, and was ended. Stacks of its threads: {stacks}",
            where=folder,
            hint="look there for what it waited for; the same command resumes from the last checkpoint. A run that is "
            "only slow needs a larger --compute.stall-s",
        )


def beat() -> None:
    """Note progress of this process. Costs an assignment; does nothing where there is no watchdog."""
    if _current is not None:
        _current.beat()


def ticking(then: Tick | None) -> Tick:
    """The `tick` of a `Context`: a beat that knows its step, followed by `then`."""

    def tick(stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        if _current is not None:
            _current.at(_Place(stage, epoch, epochs, step, steps))
        if then is not None:
            then(stage, epoch, epochs, step, steps)

    return tick


@contextmanager
def watching(folder: Path, *, rank: int, limit_s: float) -> Iterator[None]:
    """Watch this process while the body runs; every rank its own.

    Args:
        folder: of the run.
        limit_s: how long there may be no beat. 0: nothing is watched.
    """
    global _current
    collect(folder, rank=rank)
    if not limit_s:
        yield
        return
    watchdog = Watchdog(folder, rank, limit_s)
    _current = watchdog
    try:
        with _ctrl_z(watchdog):
            yield
    finally:
        _current = None
        watchdog.stop()


@contextmanager
def _ctrl_z(watchdog: Watchdog) -> Iterator[None]:
    """While a terminal has stopped the process (SIGTSTP), it is not hung. A SIGSTOP cannot be seen: after one that is
    longer than a run allows, the run ends as if it had hung."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTSTP) != signal.SIG_DFL:
        yield
        return

    def stop(*_: object) -> None:
        with watchdog.paused():
            os.kill(os.getpid(), signal.SIGSTOP)

    signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)


@dataclass(frozen=True)
class _Place:
    stage: str
    epoch: int
    epochs: int
    step: int
    steps: int

    def __str__(self) -> str:
        return f"{self.stage}, epoch {self.epoch} of {self.epochs}, step {self.step} of {self.steps}"


class Watchdog:
    """See the module. Everything it writes is best effort; a storage that cannot be written still ends the process."""

    def __init__(self, folder: Path, rank: int, limit_s: float):
        self._folder, self._rank, self._limit = folder, rank, limit_s
        self._beats, self._place = 0, None
        self._last = time.monotonic()
        self._poll = min(limit_s / 10, 5.0)
        self._linger = min(max(limit_s / 5, 2 * self._poll), 30.0)
        self._ready = _ready_file(folder, rank)
        self._paused, self._arming = False, threading.RLock()
        self._stop = threading.Event()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, place: _Place) -> None:
        before, self._place = self._place, place
        if before is None or before.stage != place.stage:
            logs.in_stage(place.stage)
            logs.event("stage begins", epoch=place.epoch, epochs=place.epochs, steps=place.steps)
        self.beat()

    def beat(self) -> None:
        self._beats += 1
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, time does not count."""
        with self._arming:
            self._paused = True
            faulthandler.cancel_dump_traceback_later()
        yield
        self._last = time.monotonic()
        self._paused = False
        self._arm()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._ready is not None:
            faulthandler.cancel_dump_traceback_later()
            self._ready.close()
            with suppress(OSError):
                os.unlink(self._ready.name)

    @property
    def _limit_now(self) -> float:
        return self._limit if self._place is not None else START_FACTOR * self._limit

    # -- the thread

    def _watch(self) -> None:
        while not self._stop.wait(self._poll):
            if self._paused:
                continue
            beats, waited = self._beats, time.monotonic() - self._last
            if waited < self._limit_now:
                self._arm()
                continue
            path = self._write(waited)
            # the other ranks wait for this one, or will: end here and they fail before they have written theirs
            if self._stop.wait(self._linger):
                return
            if self._beats != beats:  # slow, not stuck
                logs.event("continued after a stall", seconds=round(time.monotonic() - self._last, 1))
                continue
            self._say(waited, path)
            os._exit(EXIT_CODE)

    def _arm(self) -> None:
        """Restart the timer of the C thread. Called from this thread: beats stay cheap, a held GIL ends the calls."""
        with self._arming:
            if self._ready is not None and not self._paused:
                self._arm_with(self._ready)

    def _arm_with(self, ready: TextIO) -> None:
        after = self._limit_now + self._linger + 2 * self._poll
        with suppress(OSError):
            ready.seek(0)
            ready.truncate()
            ready.write(self._header(f"no beat for {after:.0f} s, and C code holds the interpreter"))
            ready.flush()
        faulthandler.dump_traceback_later(after, exit=True, file=ready)

    def _header(self, what: str) -> str:
        return (
            f"{what}\nrun    {self._folder}\nrank   {self._rank}\nhost   {socket.gethostname()}\npid    {os.getpid()}\n"
            f"at     {self._place or 'the start, before the first step'}\ntime   {_now()}\n\n"
        )

    def _write(self, waited: float) -> Path | None:
        """The stacks of all threads; the main thread's comes last."""
        path = self._folder / FOLDER / f"rank{self._rank}-{_now()}.txt"
        logs.event("stall", seconds=round(waited, 1), stacks=str(path), level=logging.ERROR)
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "w") as file:
                file.write(self._header(f"no step for {waited:.0f} s"))
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                os.fsync(file.fileno())
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
            return None
        return path

    def _say(self, waited: float, path: Path | None) -> None:
        stacks = "above" if path is None else str(path)
        with suppress(OSError, ValueError):
            error = StalledError.of(self._folder, f"rank {self._rank} made no step for {waited:.0f} s", stacks)
            print(f"error: {error}", file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def _ready_file(folder: Path, rank: int) -> TextIO | None:
    path = folder / logs.FOLDER / f".rank{rank}.stacks"
    try:
        path.parent.mkdir(exist_ok=True)
        return open(path, "w")  # for as long as the process is watched
    except OSError:
        return None


def collect(folder: Path, rank: int | None = None) -> None:
    """Move what the C thread of an ended process wrote to the other stacks; of all ranks unless one is given."""
    for path in sorted((folder / logs.FOLDER).glob(f".rank{'*' if rank is None else rank}.stacks")):
        with suppress(OSError):
            if "Timeout (" in path.read_text():
                (folder / FOLDER).mkdir(exist_ok=True)
                path.rename(folder / FOLDER / f"{path.stem.lstrip('.')}-{_now()}.txt")
            else:
                path.unlink()


def stacks(folder: Path) -> list[Path]:
    """All that was left in a run folder, oldest first."""
    return sorted((folder / FOLDER).glob("*.txt"), key=lambda path: path.stem.split("-")[::-1])


def stalled(folder: Path, known: Collection[Path], died: str) -> StalledError | None:
    """The error for a run that failed because it hung; None where it failed for another reason.

    Args:
        known: the stacks that were there when it started.
        died: Ray's message on the workers that failed last; it names them by "pid=N". Stalls that the run recovered
            from before do not count.
    """
    collect(folder)
    found = [path for path in stacks(folder) if path not in known]
    found = [path for path in found if any(f"pid={pid}," in died for pid in _PID.findall(path.read_text()))]
    if not found:
        return None
    return StalledError.of(folder, "its workers hung", ", ".join(map(str, found)))


def collective_timeout_s(limit_s: float) -> float:
    """How long a collective may wait for a rank: longer than the watchdog, whose stacks say more than an exception."""
    return max(600.0, limit_s + 300.0) if limit_s else 600.0
