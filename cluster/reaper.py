"""Ends what is left of a Ray of our own when the process that started it is gone, however it went.

Run as a script of its own, with the standard library alone, so that it starts in milliseconds:

    python reaper.py FOLDER MESSAGE

Standard input is a pipe whose other end only that process holds. Each line on it is the pid of a process of Ray's; at
its end, which the kernel brings about even after SIGKILL, those processes and all that they have started are killed,
and FOLDER is removed.

The kernel itself kills Ray's servers with the process that started them. Ray's agents notice that half a minute and
more later, and training workers may still be writing by then to the folder of a run that was started again.

While Ray starts, its library ends the process itself where a server of Ray's has died: without an exception, with a
line of its own log. What is said meanwhile goes to FOLDER/STDERR_FILE (see `session`); if the process ends so, MESSAGE
is printed with that line, on the standard error that both share.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

INTERVAL_S = 1.0
"""Between looks at who has started whom: a child of a dead process can no longer be told from others'."""

STDERR_FILE = "said"
"""What a process says on standard error while it starts Ray. There as long as it does."""
WHAT = "{what}"
"""In a message: where the line of Ray's log belongs."""
OF_RAY = re.compile(r"\[20\d\d-\d\d-\d\d [^]]*\] (?:[\w.]+:\d+: )?")
"""How a line of the log of Ray's library begins: when, how grave, processes, and where in its source."""

Process = tuple[int, int]
"""pid, and the time it was started at in clock ticks since boot: together never used twice."""


def running() -> dict[int, tuple[int, int]]:
    """Of every process that runs on this machine: its pid, parent, and start."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            found[int(entry.name)] = (int(fields[1]), int(fields[19]))
    return found


def grown(known: set[Process], roots: Iterable[int], now: dict[int, tuple[int, int]]) -> set[Process]:
    """Those of `known` that still run, the `roots`, and all that descend from either."""
    family = {(pid, start) for pid, start in known if now.get(pid, (0, 0))[1] == start}
    family |= {(pid, now[pid][1]) for pid in roots if pid in now}
    while True:
        pids = {pid for pid, _ in family}
        more = {(pid, start) for pid, (parent, start) in now.items() if parent in pids} - family
        if not more:
            return family
        family |= more


def kill(family: set[Process]) -> None:
    """SIGKILL to those that still run."""
    now = running()
    for pid, start in family:
        if now.get(pid, (0, 0))[1] == start:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def told(text: str, message: str) -> str:
    """What there is to say of a start that ended with the process: what others said, and the message where Ray's log
    says something; a process that was killed has said nothing."""
    lines = text.splitlines(keepends=True)
    from_ray = [line for line in lines if OF_RAY.match(line)]
    if not from_ray:
        return text
    before = "".join(lines[: lines.index(from_ray[0])])  # after it comes where in the library
    what = OF_RAY.sub("", from_ray[-1])
    return before + message.replace(WHAT, textwrap.shorten(what, 200, placeholder="...")) + "\n"


def _tell(folder: Path, message: str) -> None:
    with suppress(OSError):  # Ray was running, or nobody reads this any more
        os.write(2, told((folder / STDERR_FILE).read_text(errors="replace"), message).encode())


def main(folder: str, message: str) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the command, which may take its time
        signal.signal(ignored, signal.SIG_IGN)
    family: set[Process] = set()
    text = b""
    while True:
        readable, _, _ = select.select([0], [], [], INTERVAL_S)
        if readable:
            data = os.read(0, 4096)
            if not data:
                break
            text += data
        roots = [int(line) for line in text.split(b"\n")[:-1]]
        text = text[text.rfind(b"\n") + 1 :]
        if family or roots:
            family = grown(family, roots, running())
    _tell(Path(folder), message)
    for _ in range(2):  # once more for what was being started meanwhile
        family = grown(family, (), running())
        kill(family)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
