"""Weights & Biases: `pip install 'dbd-dist[wandb]'`. WANDB_MODE=offline writes below the run folder alone."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

from dbd_dist.tracking.tracker import RunInfo, Tracker, figures


class Wandb(Tracker):
    """A run of the same name resumes; project and entity are those of WANDB_PROJECT and WANDB_ENTITY."""

    name = "wandb"
    package = "wandb"

    def __init__(self, run: RunInfo):
        super().__init__(run)
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            name=run.name,
            id=hashlib.sha256(str(run.folder).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log({**figures(row), f"{row['stage']}/epoch": row["epoch"]})

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._run.summary.update({k: v for k, v in result.items() if isinstance(v, int | float)})
        self._run.finish(exit_code=0 if result is not None else 1)
