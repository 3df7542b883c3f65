"""Help of commands, kept between processes: building it imports PyTorch and every method, seconds on a slow machine.

A page is kept for exactly what it was made from: the arguments, the terminal, and every source file of the project
and of the plugins, by size and time of change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata, util
from pathlib import Path
from typing import Any, TextIO

from data_prep.io import atomic
from data_prep.io.hashcache import folder

PACKAGES = ("cluster", "data_prep", "dbd_dist", "tune_spaces")
FOLDER = "help"
"""Below the user's cache."""

_VARIABLES = ("TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "LANG", "LC_ALL", "PYTHONUTF8", "DBD_STORAGE", "HOME")
_PAGES = 200  # of one state of the sources: a terminal of another width has pages of its own
_STATES = 4  # of the sources: several installations


def asks(argv: list[str]) -> bool:
    """Do these arguments ask for a page that depends on nothing else? A path among them may."""
    return bool({"-h", "--help"} & set(argv)) and not any(set(":/\\") & set(a) or Path(a).exists() for a in argv)


def show(name: str, argv: list[str], make: Callable[[], int]) -> int:
    """Print the help of a command: the page that is kept, or what `make` prints, which is kept then.

    Only a page that came with exit code 0 and without a word on stderr is kept; nothing is where the user's cache
    cannot be written.

    Raises:
        SystemExit: as `make` does.
    """
    place = _place(name, argv)
    if place is not None:
        with suppress(OSError, UnicodeError):
            if place.stat().st_uid == os.geteuid():
                sys.stdout.write(place.read_text(encoding="utf-8"))
                return 0
    code: object = 0
    with _heard() as (printed, warned):
        try:
            code = make()
        except SystemExit as end:
            code = end.code or 0
            raise
        finally:
            if place is not None and code == 0 and printed.text and not warned.text:
                _keep(place, printed.text)
    return code if isinstance(code, int) else 0


def _place(name: str, argv: list[str]) -> Path | None:
    base = folder()
    if base is None:
        return None
    here = [name, *argv, str(sys.stdout.isatty()), str(sys.stdout.encoding), str(shutil.get_terminal_size())]
    here += [f"{variable}={os.environ.get(variable)}" for variable in _VARIABLES]
    return base / FOLDER / _digest(_sources()) / f"{_digest(here)}.txt"


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\0".join(lines).encode(errors="surrogateescape")).hexdigest()[:32]


def _sources() -> list[str]:
    """What the pages are made from: Python, the libraries that are installed, and every file of the code."""
    entries = sorted(
        f"{entry.group} {entry.name} {entry.value}"
        for group in metadata.entry_points().groups
        if group.startswith("dbd_dist.")
        for entry in metadata.entry_points(group=group)
    )
    plugins = {entry.split()[2].partition(":")[0].partition(".")[0] for entry in entries}
    lines = [sys.version, sys.prefix, *sys.path, *entries]
    lines += [_state(path) for path in sys.path if path.endswith("site-packages")]  # changes as something is installed
    for package in (*PACKAGES, *sorted(plugins - set(PACKAGES))):
        found = util.find_spec(package)
        if found is None or found.origin is None:
            continue
        if found.submodule_search_locations:
            lines += [_state(file) for root in found.submodule_search_locations for file in _python_files(root)]
        else:
            lines.append(_state(found.origin))
    return lines


def _python_files(root: str) -> Iterator[str]:
    for folder_, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name != "__pycache__")
        yield from (os.path.join(folder_, name) for name in sorted(files) if name.endswith(".py"))


def _state(path: str) -> str:
    try:
        at = os.stat(path)
    except OSError:
        return f"{path} -"
    return f"{path} {at.st_size} {at.st_mtime_ns}"


class _Heard:
    """A stream, and what is written to it."""

    def __init__(self, stream: TextIO):
        self._stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text += text
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _heard() -> Iterator[tuple[_Heard, _Heard]]:
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Heard(stream) for stream in streams)
    try:
        yield sys.stdout, sys.stderr  # type: ignore[misc]
    finally:
        sys.stdout, sys.stderr = streams


def _keep(place: Path, page: str) -> None:
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        states = sorted(place.parent.parent.iterdir(), key=lambda old: old.stat().st_mtime_ns)
        for old in states[:-_STATES]:
            shutil.rmtree(old, ignore_errors=True)
        if len(list(place.parent.iterdir())) < _PAGES:
            atomic.write_text(place, page)
