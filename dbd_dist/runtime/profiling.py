"""Traces of training steps with torch's profiler, for ui.perfetto.dev."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dbd_dist.runtime import logs

log = logging.getLogger(__name__)

FOLDER = "profile"
WARM_UP = 3
"""Steps of a stage before those that are traced: the first compile, fill caches, and ask for memory."""


class Profile:
    """Traces the same number of steps of each stage, in one process.

    Args:
        folder: of the run; a trace is written to FOLDER/profile/STAGE.json.
        steps: how many; fewer where the stage ends before.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device):
        self._folder, self._steps = folder / FOLDER, steps
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._stage: str | None = None
        self._active: profile | None = None

    def step(self, stage: str) -> None:
        """A step of a stage is over."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._active = profile(
                activities=self._activities,
                schedule=schedule(wait=WARM_UP - 1, warmup=1, active=self._steps, repeat=1),
                on_trace_ready=self._write,
            )
            self._active.start()
        elif self._active is not None:
            self._active.step()

    def close(self) -> None:
        """The stage, or the run, is over."""
        if self._active is not None:
            self._active.stop()
            self._active = None

    def _write(self, traced: profile) -> None:
        path = self._folder / f"{self._stage}.json"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a trace is no reason to end a run
            log.warning("no trace of %s: %s", self._stage, error)
            return
        logs.event("trace written", path=str(path))
