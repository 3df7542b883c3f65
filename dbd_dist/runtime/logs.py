"""What happened to a run, as JSON lines: RUN/logs/rankR.jsonl of each training process, for people and programs.

Plain `logging` underneath. Messages of our modules (``logging.getLogger(__name__)``, from INFO up), torch's, and
Python's warnings are written; warnings reach the terminal too, as they do without a log. Events go to the log only, and
nowhere while none is open. Logging is best effort: no error of the storage in here ends a run.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = "logs"
MAX_BYTES, OLDER_FILES = 4 << 20, 2
"""A log that grows past MAX_BYTES is renamed to .1, that to .2: at most three times MAX_BYTES for a process."""

_LOGGERS = ("dbd_dist", "torch", "dbd_dist.events")
_ours = logging.getLogger("dbd_dist")
_events = logging.getLogger("dbd_dist.events")
_events.propagate = False  # not to the terminal
_events.setLevel(logging.INFO)
_events.addHandler(logging.NullHandler())
_PLAIN = {*vars(logging.makeLogRecord({})), "message", "asctime", "fields"}
_stage: str | None = None


def event(text: str, *, level: int = logging.INFO, exc_info: bool = False, **fields: Any) -> None:
    """Note that something happened.

    Args:
        text: what, in the same words each time: "checkpoint written".
        exc_info: add the traceback of the exception that is being handled.
        fields: plain values beside it; "stage" replaces that of `in_stage`.
    """
    _events.log(level, text, exc_info=exc_info, extra={"fields": fields})


def start(world_size: int, device: str, versions: dict[str, str]) -> None:
    """The first event of a process."""
    event("start", world_size=world_size, device=device, versions=versions)


def in_stage(stage: str | None) -> None:
    """The stage that events of this process belong to from now on."""
    global _stage
    _stage = stage


class Lines(logging.Formatter):
    """A record as one JSON object: time (UTC), level, run, rank, host, pid, stage, event, and its own fields."""

    def __init__(self, run: str, rank: int | str):
        super().__init__()
        self._same = {"run": run, "rank": rank, "host": socket.gethostname(), "pid": os.getpid()}

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._same,
            "stage": _stage,
            "event": record.getMessage(),
        }
        if record.name != _events.name:
            row["logger"] = record.name
        row |= {name: value for name, value in vars(record).items() if name not in _PLAIN and name[0] != "_"}
        row |= getattr(record, "fields", {})
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)


class _File(logging.handlers.RotatingFileHandler):
    def __init__(self, path: Path, run: str, rank: int | str):
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=OLDER_FILES, encoding="utf-8", delay=True)
        self.setFormatter(Lines(run, rank))

    def handleError(self, record: logging.LogRecord) -> None:  # logging would print a traceback for every event
        pass


@contextmanager
def log_to(folder: Path, *, run: str, rank: int | str) -> Iterator[None]:
    """Write events, torch's messages and Python's warnings to FOLDER/rankR.jsonl of a run folder while the body runs;
    its failure too, with the traceback.

    Args:
        folder: of the run; nothing is logged where it is missing.
        rank: of this process, or another word for what it does.
    """
    name = f"rank{rank}" if isinstance(rank, int) else rank
    path = folder / FOLDER / f"{name}.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)  # a run folder that is gone is not made anew
        _end_torn_line(path)
    except OSError:
        yield
        return
    handler = _File(path, run, rank)
    level, show = _ours.level, warnings.showwarning
    # logging shows warnings on the terminal only where there is no other handler
    terminal = logging.lastResort if not logging.getLogger().handlers and not _ours.handlers else None

    def show_and_log(message, category, filename, lineno, file=None, line=None) -> None:
        show(message, category, filename, lineno, file, line)
        event(str(message), level=logging.WARNING, category=category.__name__, where=f"{filename}:{lineno}")

    for logger in _LOGGERS:
        logging.getLogger(logger).addHandler(handler)
    if terminal is not None:
        _ours.addHandler(terminal)
    _ours.setLevel(logging.INFO)
    warnings.showwarning = show_and_log
    try:
        yield
    except BaseException as error:
        if getattr(error, "is_request", False):  # a stopping.Stopped, whose module would import torch
            event("stopped", message=str(error))
        else:
            event("failure", level=logging.ERROR, exc_info=True, type=type(error).__name__)
        raise
    finally:
        warnings.showwarning = show
        _ours.setLevel(level)
        if terminal is not None:
            _ours.removeHandler(terminal)
        for logger in _LOGGERS:
            logging.getLogger(logger).removeHandler(handler)
        handler.close()
        in_stage(None)


def _end_torn_line(path: Path) -> None:
    """End a line that a killed process left unfinished: the next one would be appended to it."""
    if path.exists() and path.stat().st_size:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
