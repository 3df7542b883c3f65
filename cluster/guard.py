"""The processes of a Ray of our own, and what says that one of them has ended before anything waits for a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import ClassVar

from data_prep.errors import UserError

POLL_S = 0.05
THREAD = "guard of Ray"
NEEDED = {"gcs_server": "Ray's head process, gcs_server,", "raylet": "Ray's process for this machine, raylet,"}


def own_processes() -> list[tuple[str, subprocess.Popen]]:
    """Processes of the Ray that this process started, those that it cannot do without first; elsewhere none."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None:
        return []
    return [(phrase, info.process) for kind, phrase in NEEDED.items() for info in node.all_processes.get(kind, ())]


def ended(processes: list[tuple[str, subprocess.Popen]]) -> str | None:
    """Which of them has ended, and how, in words. Reaps it."""
    for name, process in processes:
        code = process.poll()
        if code is not None:
            return f"{name} (pid {process.pid}) {how_it_ended(code)}"
    return None


def how_it_ended(code: int) -> str:
    """An exit code as `subprocess` gives it, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


class Guard:
    """Ends this process with one message and exit code 1 where its own Ray has ended.

    From the start of Ray until a `session.Watch` takes over: Ray's library ends the process some tenths of a second
    later from C++, without a word. Nothing can be tidied up in that time; what is left is what a SIGKILL leaves.
    """

    _current: ClassVar[Guard | None] = None

    def __init__(self) -> None:
        self._processes = own_processes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=THREAD, daemon=True)
        Guard._current = self
        self._thread.start()

    def stop(self) -> None:
        """To be called before these processes are ended on purpose."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            lost = ended(self._processes)
            if lost is not None:
                error = UserError(lost, hint="the same command starts it again")
                with suppress(OSError, ValueError):  # nobody reads it any more
                    print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)


def relieve() -> None:
    """Somebody else watches from here on."""
    if Guard._current is not None:
        Guard._current.stop()
