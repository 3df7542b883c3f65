"""States on disk: where a run can go on, and finished stages that other runs can start from.

Written aside and renamed, so that a reader finds a whole file or none; loaded with ``weights_only``, so that a file
from a
stranger cannot run code.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import UserError

STATE_FILE = "state.pt"
CHECKPOINTS_KEPT = 2
CHECKPOINT_KEYS = ("stage", "key", "state")


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def load_state(path: Path, *, needs: Sequence[str]) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU.

    Args:
        needs: keys that the state must have.

    Raises:
        UserError: the file is damaged or not ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file
        raise UserError(
            f"not readable as a state ({type(error).__name__})",
            where=path,
            fix="delete this file and run again",
        ) from error
    if not isinstance(state, dict) or not set(needs) <= set(state):
        raise UserError(
            "not a state of a run",
            where=path,
            allowed=f"{', '.join(needs)} in it",
            fix="delete this file and run again",
        )
    return state


class Checkpoints(Protocol):
    """Where a run saves its state after each epoch. Every rank calls `save` equally often; rank 0's state counts."""

    def latest(self) -> dict[str, Any] | None: ...

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None: ...


class FolderCheckpoints:
    """Checkpoints in a plain folder, the newest `keep` of them: used without a Ray cluster."""

    def __init__(self, folder: Path, *, is_main: bool, keep: int = CHECKPOINTS_KEPT):
        self._folder, self._is_main, self._keep = folder, is_main, keep

    def _all(self) -> list[Path]:
        return sorted(self._folder.glob(f"checkpoint_*/{STATE_FILE}"))

    def latest(self) -> dict[str, Any] | None:
        found = self._all()
        return load_state(found[-1], needs=CHECKPOINT_KEYS) if found else None

    def save(self, state: dict[str, Any], metrics: dict[str, Any]) -> None:
        if not self._is_main:
            return
        found = self._all()
        number = int(found[-1].parent.name.split("_")[1]) + 1 if found else 0
        save_state(state, self._folder / f"checkpoint_{number:06d}" / STATE_FILE)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old.parent)


class StageStore:
    """Finished stages, found again by a hash over exactly what they depend on."""

    def __init__(self, root: Path):
        self._root = root

    def path(self, stage: str, key: str) -> Path:
        return self._root / f"{stage}-{key}" / STATE_FILE

    def has(self, stage: str, key: str) -> bool:
        return self.path(stage, key).exists()

    def load(self, stage: str, key: str) -> dict[str, Any]:
        return load_state(self.path(stage, key), needs=("rows",))

    def save(self, stage: str, key: str, state: dict[str, Any]) -> None:
        save_state(state, self.path(stage, key))
