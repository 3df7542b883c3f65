"""Curves for TensorBoard, written by the thread that asks for it.

`SummaryWriter` writes in a thread of its own: where the storage goes away that thread ends with a traceback on the
terminal, and the file is opened anew for every write, wherever the path leads by then.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """One open event file in `folder`, which is made where it is missing.

    Raises:
        OSError: it cannot be written; every method may raise it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = open(folder / name, "ab")  # noqa: SIM115 - until `close`
        self._writer = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Add a point to each of the curves named, and flush."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        self._file.flush()

    def _write(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()
