"""Calls of Ray's library that wait for a cluster, in threads of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import ClassVar


class Call:
    """`function()`, begun at once.

    In a thread: in the main one Ray Train takes Ctrl-C as an order to abort; and where Ray has ended, some of its
    functions never return. Such a thread is not waited for at the end (see `unfinished`).
    """

    _all: ClassVar[list[threading.Thread]] = []

    def __init__(self, function: Callable[[], object]):
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._body, name="fit", daemon=True)
        self._all.append(self._thread)
        self._thread.start()

    def _body(self) -> None:
        try:
            self._function()
        except BaseException as error:  # also SystemExit, which Ray raises in waiting threads when it is shut down
            self._error = error

    def runs(self, wait_s: float = 0.0) -> bool:
        """Whether the call is still under way, after that long at most."""
        if wait_s:
            self._thread.join(wait_s)
        return self._thread.is_alive()

    @property
    def error(self) -> BaseException | None:
        """What a call that has ended has raised."""
        return self._error


def unfinished(wait_s: float = 0.0) -> bool:
    """Whether calls of this process that nobody waits for any more are still under way, after that long at most.

    Python must not be torn down then: it ends such threads inside Ray's C++ code, and the process dies of SIGSEGV.
    """
    end = time.monotonic() + wait_s
    for thread in Call._all:
        thread.join(max(end - time.monotonic(), 0.0))
    Call._all[:] = [thread for thread in Call._all if thread.is_alive()]
    return bool(Call._all)
