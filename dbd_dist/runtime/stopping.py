"""Stopping a run on request, with a checkpoint to resume from: by Ctrl-C, SIGTERM, or because a node will be preempted.

A request reaches the training as a flag in this process, as a file in the run folder (the driver writes it for workers
on other machines), or as Ray's preemption notice. All ranks stop after the same step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from data_prep.errors import UserError
from data_prep.io.atomic import write_text
from dbd_dist.distributed.world import World

FILE = "stop"
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}


class Stopped(UserError):
    """The run was asked to stop, and left a checkpoint that the same command resumes from."""

    is_request = True

    def __init__(self, what: str, *, where: str | Path | None = None, hint: str | None = None, exit_code: int):
        super().__init__(what, where=where, hint=hint)
        self.exit_code = exit_code

    @classmethod
    def at(cls, reason: str, position: str, folder: Path) -> Stopped:
        what = f"stopped after {position} ({reason})"
        return cls(what, where=folder, hint="the same command resumes from there", exit_code=EXIT_CODES[reason])


class StopRequest:
    """Whether the run was asked to stop, and why.

    Args:
        file: a request from another process; read only where `reads_file`.
        notice: a further source, polled at every `reason` (Ray's: all ranks have to poll it equally often). "state"
            asks for a checkpoint only: the run continues until its node is gone, and Ray starts it again elsewhere.
    """

    def __init__(self, file: Path, *, reads_file: bool = False, notice: Callable[[], str | None] | None = None):
        self._file, self._reads_file, self._notice = file, reads_file, notice
        self._reason: str | None = None
        self.forwarded: tuple[str, float] | None = None
        """What was passed on, and when (monotonic clock)."""

    def set(self, reason: str) -> None:
        self._reason = reason

    def forward(self, reason: str) -> None:
        """Pass a request on to the process that reads the file."""
        self.forwarded = (reason, time.monotonic())
        write_text(self._file, reason)

    def clear(self) -> None:
        """Forget a request of an earlier run."""
        self._file.unlink(missing_ok=True)
        self._reason = self.forwarded = None

    def reason(self) -> str | None:
        noticed = self._notice() if self._notice is not None else None
        if self._reason is None and self._reads_file:
            with suppress(OSError):  # no request
                text = self._file.read_text()
                self._reason = text if text in EXIT_CODES else None
        return self._reason or noticed


class StopPoller:
    """Polls about once a second, on all ranks after the same step, whether the run is to stop.

    Rank 0 turns the second into a number of steps by how long steps take.
    """

    EVERY_S = 1.0

    def __init__(self, world: World, request: StopRequest):
        self._world, self._request = world, request
        self._left, self._between = 1, 1
        self._noticed = False
        self._polled = time.monotonic()

    def poll(self, *, now: bool = False) -> str | None:
        """The request: the name of a signal, "state", or None. Every rank calls this after every step.

        Args:
            now: poll at once, however short ago that was done.
        """
        self._left -= 1
        if self._left > 0 and not now:
            return None
        since, made = time.monotonic() - self._polled, self._between - self._left
        steps = max(1, min(int(made * self.EVERY_S / max(since, 1e-6)), 10_000)) if self._world.is_main else 1
        code, steps = self._world.all_reduce_max([_CODES[self._request.reason()], float(steps)])
        self._left = self._between = int(steps)
        self._polled = time.monotonic()
        reason = _REASONS[code]
        if reason == "state":  # Ray repeats a notice until the node is gone; one checkpoint answers it
            reason, self._noticed = None if self._noticed else reason, True
        return reason


_CODES: dict[str | None, float] = {None: 0.0, "state": 1.0, "SIGINT": 2.0, "SIGTERM": 3.0}
_REASONS = {code: reason for reason, code in _CODES.items()}


@contextmanager
def signals(request: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, the first SIGINT or SIGTERM calls `request` with its name; a second ends the process at once.

    Only in the main thread, where Python delivers signals; in others the block changes nothing. A signal that this
    process was started to ignore stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        name = signal.Signals(number).name
        if seen > 1:
            os.write(2, b"stopping at once; the same command resumes from the last checkpoint\n")
            raise KeyboardInterrupt
        os.write(2, f"{name}: stopping after this step, with a checkpoint; again stops at once\n".encode())
        try:
            request(name)
        except OSError as error:
            os.write(2, f"that cannot be passed on ({error}): stopping at once\n".encode())
            raise KeyboardInterrupt from error

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handle) for s in wanted}
    sys.stderr.flush()
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
