"""States on disk: checkpoints that a run resumes from, and finished stages that other runs can start from.

A state is one file: a line that names the format, a line with the sha256 of the rest, and the rest as `torch.save`
writes it. It is written to a temporary file and renamed, so that a reader finds a whole file or none; its hash is
checked before anything in it is used; and it is loaded with ``weights_only``, so that a file from a stranger cannot run
code.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.io.atomic import remove_stale, write_bytes
from data_prep.io.limits import refuse_pipes
from dbd_dist.runtime import logs
from dbd_dist.runtime.mirror import Mirror

STATE_FILE = "state.pt"
CHECKPOINTS_KEPT = 2
CHECKPOINT_KEYS = ("stage", "key", "state", "rows")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 10.0

_NO_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO)
"""A folder, a link to nothing, a pipe or a device in the place of a file."""
_NAME = re.compile(r"checkpoint_([0-9]{6,12})\.pt")
_FORMAT = b"dbd-state 1\n"
_HEAD_BYTES = len(_FORMAT) + 65  # the hash in hexadecimal digits, and a line break

Value = TypeVar("Value")
log = logging.getLogger(__name__)


class DamagedState(UserError):
    """No state, or one whose bytes or content are not those that were written."""


# -------------------------------------------------------------------------------------------- one state


def save_state(state: dict[str, Any], path: Path, *, check: Callable[[], None] = lambda: None) -> None:
    """Write tensors and plain values to `path`, atomically.

    Args:
        check: called right before anything is written; raises an OSError where that is not to be.

    Raises:
        OSError: no room, no permission, or the storage is gone; `path` is as it was.
    """
    payload = io.BytesIO()
    torch.save(state, payload)
    content = payload.getbuffer()
    check()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, _FORMAT + hashlib.sha256(content).hexdigest().encode() + b"\n", content, sync=True)


def load_state(path: Path, *, needs: Sequence[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Args:
        needs: keys that the state must have.

    Raises:
        DamagedState: not a file, not as it was written, or not ours.
        UserError: the storage cannot be read.
    """
    hint = "delete this file and run again: what it held is computed anew"
    try:
        refuse_pipes(path)
        content = path.read_bytes()
    except OSError as error:
        kind = DamagedState if error.errno in _NO_FILE else UserError
        raise kind(f"cannot be read ({error.strerror})", where=path, hint=hint) from error
    if not content.startswith(_FORMAT):
        raise DamagedState("not a state of this version, or damaged", where=path, hint=hint)
    payload = memoryview(content)[_HEAD_BYTES:]
    digest = content[len(_FORMAT) : _HEAD_BYTES]
    if digest != hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise DamagedState("damaged: its sha256 is not the one that was written with it", where=path, hint=hint)
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what it cannot read
        raise DamagedState(f"not readable as a state ({type(error).__name__})", where=path, hint=hint) from error
    if not isinstance(state, dict) or not set(needs) <= set(state):
        raise DamagedState("not a state of a run", where=path, expected=f"{', '.join(needs)} in it", hint=hint)
    wrong = [name for name in needs if not _CONTENT.get(name, lambda value: True)(state[name])]
    if wrong:
        raise DamagedState(f"not a state of a run: {wrong[0]} is not what it should be", where=path, hint=hint)
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_position(value: Any) -> bool:
    """A stage's own part of a checkpoint; what else is in it is for the stage to check."""
    return isinstance(value, dict) and _is_count(value.get("epoch")) and _is_count(value.get("step", 0))


def _is_row(value: Any) -> bool:
    """A line of metrics.jsonl; what a detector reports has no loss."""
    return (
        isinstance(value, dict)
        and isinstance(value.get("stage"), str)
        and all(_is_count(value.get(name)) for name in ("epoch", "epochs"))
        and isinstance(value.get("time_s"), int | float)
        and isinstance(value.get("loss", 0.0), int | float)
    )


_CONTENT: dict[str, Callable[[Any], bool]] = {
    "stage": lambda value: isinstance(value, str),
    "key": lambda value: isinstance(value, str),
    "state": _is_position,
    "rows": lambda value: isinstance(value, list) and all(map(_is_row, value)),
}
"""What each part of a state has to be."""


def stored_sha256(path: Path) -> str:
    """The hash that `save_state` wrote into a file."""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)[len(_FORMAT) :].decode().strip()


def on_cpu(value: Any) -> Any:
    """A copy of a nested state whose tensors are on the CPU and nobody else's."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_cpu(v) for v in value)
    return value


def retry_on_oserror(write: Callable[[], Value], where: Path, patience_s: float) -> Value:
    """Call `write`; while it fails with an OSError, again and again for up to `patience_s`.

    Storage that is shared goes away for a while: a server restarts, a disk is full until somebody makes room.

    Raises:
        UserError: it still fails then.
    """
    end, wait = time.monotonic() + patience_s, FIRST_WAIT_S
    while True:
        try:
            return write()
        except OSError as error:
            left = end - time.monotonic()
            if left <= 0:
                raise UserError(
                    f"cannot be written ({error.strerror or error}), tried for {patience_s:.0f} s",
                    where=error.filename or where,
                    hint="make room or bring the storage back; the same command resumes from the last checkpoint",
                ) from error
            log.warning("%s cannot be written (%s); trying again", where, error.strerror or error)
            time.sleep(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT_S)


# -------------------------------------------------------------------------------------------- a run's states


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, oldest first; whatever has another name is not ours."""
    return sorted((path for path in folder.glob("checkpoint_*.pt") if _NAME.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.partition("_")[2])


class Checkpoints:
    """The states of one run, the newest `keep` of them, written by rank 0 in the background.

    Args:
        folder: of the run; made at the first save.
        is_main: whether this process is rank 0. Others may read.
        mirror: a second place that each state is copied to, in the background too.
        patience_s: see `retry_on_oserror`.
        check: see `save_state`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_main: bool,
        keep: int = CHECKPOINTS_KEPT,
        mirror: Mirror | None = None,
        patience_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ):
        self._folder, self._is_main, self._keep = folder, is_main, keep
        self._mirror, self._patience, self._check = mirror, patience_s, check
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self.newest_path: Path | None = None
        """The newest checkpoint that this process has written."""
        self.write_s: float | None = None
        """How long it took to write, in seconds."""

    def newest(self) -> tuple[str, dict[str, Any]] | None:
        """Name and content of the newest state that can be used; others are logged and passed over.

        Raises:
            UserError: there is none, and one that the storage did not let us read.
        """
        unread: UserError | None = None
        for path in reversed(checkpoint_files(self._folder)):
            try:
                return path.name, load_state(path, needs=CHECKPOINT_KEYS)
            except UserError as error:
                log.warning("%s; resuming from the one before it", error)
                unread = unread if isinstance(error, DamagedState) else error
        if unread is not None:
            raise unread
        return None

    def read(self, name: str) -> dict[str, Any]:
        """The state of that name, which `newest` gave to another rank."""
        return load_state(self._folder / name, needs=CHECKPOINT_KEYS)

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` now and write it in the background; first wait for the one before.

        Raises:
            UserError: the one before could not be written.
        """
        if not self._is_main:
            return
        copy = on_cpu(state)
        self.flush()
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._writer.submit(self._write, copy)

    def flush(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: it could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """End the background thread; whether it succeeded is for `flush` to tell."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _write(self, state: dict[str, Any]) -> None:
        found = checkpoint_files(self._folder)
        number = _number(found[-1]) + 1 if found else 0
        path = self._folder / f"checkpoint_{number:06d}.pt"
        start = time.monotonic()
        retry_on_oserror(lambda: save_state(state, path, check=self._check), path, self._patience)
        self.write_s = time.monotonic() - start
        copied = self._mirror is not None and self._mirror.put(path)
        for old in checkpoint_files(self._folder)[: -self._keep]:
            _quietly_remove(old)
            if self._mirror is not None and copied:  # else the old copies are all there is
                self._mirror.remove(old)
        self.newest_path = path
        logs.event("checkpoint written", path=str(path))


# -------------------------------------------------------------------------------------------- finished stages


class StageStore:
    """Finished stages, found again by a hash over exactly what they depend on."""

    def __init__(
        self,
        root: Path,
        *,
        mirror: Mirror | None = None,
        patience_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ):
        self._root, self._mirror, self._patience, self._check = root, mirror, patience_s, check

    def path(self, stage: str, key: str) -> Path:
        return self._root / f"{stage}-{key}" / STATE_FILE

    def has(self, stage: str, key: str) -> bool:
        return self.path(stage, key).exists()

    def load(self, stage: str, key: str) -> dict[str, Any]:
        return load_state(self.path(stage, key), needs=("rows",))

    def save(self, stage: str, key: str, state: dict[str, Any]) -> None:
        """Every run that depends on the stage finds it from now on.

        Raises:
            UserError: it cannot be written.
        """
        path = self.path(stage, key)
        retry_on_oserror(lambda: save_state(state, path, check=self._check), path, self._patience)
        remove_stale_temp_files(
            path.parent
        )  # of killed runs; a living one that is writing the same just now writes it again
        if self._mirror is not None:
            self._mirror.put(path)


ASIDE = re.compile(
    r"\.(metrics\.jsonl|split\.parquet|features\.npz|(model|backbone)\.safetensors"
    r"|(run|model|backbone|result|progress)\.json\.\d+|(checkpoint_\d+|state)\.pt\.[0-9a-f]{8})"
)
"""What early versions called files that were not whole yet."""


def remove_stale_temp_files(folder: Path) -> None:
    """Remove temporary files that a killed process left in `folder`. Only for the process that holds the run's lock.

    Hidden files of others stay: those go by other names.
    """
    remove_stale(folder)
    for path in folder.glob(".*"):
        if ASIDE.fullmatch(path.name) and path.is_file():
            _quietly_remove(path)


def _quietly_remove(path: Path) -> None:
    with suppress(OSError):  # the storage is gone or read-only: the error that matters is reported elsewhere
        path.unlink(missing_ok=True)
