"""Between steps and epochs: figures logged, models measured, checkpoints saved, requests to stop heeded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbd_dist.config import TrainConfig
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.defender import Defender
from dbd_dist.evaluation.evaluator import EvalResult, Evaluator
from dbd_dist.runtime import logs
from dbd_dist.runtime.checkpoint import Checkpoints
from dbd_dist.runtime.profiling import Profile
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.run_folder import RunFolder
from dbd_dist.runtime.stopping import Stopped, StopPoller, StopRequest
from dbd_dist.stages.context import EpochEnd, StepEnd
from dbd_dist.tracking import Tracking

START = "the start"
Hook = Callable[[dict[str, Any], Path | None], None]
"""Given every row of the metrics on all ranks, and the newest checkpoint where this rank has written one."""


class Reporter:
    """What a run does with the reports of its stages; `report` and `after_step` are theirs to call, on every rank.

    Args:
        keys: of the stages that train, in order (`keys.stage_keys`).
        hook: see `Hook`.
        defender: measures beside the evaluator what can be known without the truth.
        tracking: of rank 0.
        profile: of rank 0, where one was asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        world: World,
        evaluator: Evaluator,
        checkpoints: Checkpoints,
        keys: dict[str, str],
        request: StopRequest,
        hook: Hook,
        defender: Defender | None = None,
        tracking: Tracking | None = None,
        profile: Profile | None = None,
    ):
        self._config, self._folder, self._world = config, folder, world
        self._evaluator, self._checkpoints, self._hook = evaluator, checkpoints, hook
        self._defender, self._tracking, self._profile = defender, tracking, profile
        self._keys, self._order = keys, list(keys)
        self._measures = {stage.name for stage in config.method.stages() if stage.evaluates}
        self._poller = StopPoller(world, request)
        self._saved_s = time.monotonic()
        self.progress = ProgressFile(folder.progress, check=folder.check)
        self.measured: EvalResult | None = None
        """Of the last epoch that was measured, without what the method changes at test time."""
        self.resumed: dict[str, Any] | None = None
        """The checkpoint that the run continues from."""
        self.position = START
        """Of the newest checkpoint, for people."""

    def resume_from(self, checkpoint: dict[str, Any]) -> None:
        """Note the checkpoint that the run continues from."""
        self.resumed, self.position = checkpoint, position_of(checkpoint)

    def state_of(self, stage: str) -> dict[str, Any] | None:
        """The state to resume a stage from; None at its beginning."""
        return self.resumed["state"] if self.resumed and self.resumed["stage"] == stage else None

    def after_step(self, end: StepEnd) -> None:
        """A step inside an epoch is over."""
        if self._profile is not None:
            self._profile.step(end.stage)
        every = self._config.compute.checkpoint_steps
        wanted = self._poller.poll()
        if wanted or (every and end.step % every == 0):
            self._save(end.stage, end.state())
        self._leave(wanted)

    def report(self, end: EpochEnd) -> None:
        """An epoch is over."""
        row: dict[str, Any] = {"stage": end.stage, "epoch": end.epoch, "epochs": end.epochs, **end.metrics}
        if not self._config.compute.sync_bn:
            self._world.broadcast_buffers(end.model)  # what is measured and saved is then every rank's
        last = end.epoch == end.epochs
        row |= self._measure(end, last)
        if self._world.is_main:
            self._folder.log(row)
            self.progress.note(row)
        wanted = self._poller.poll(now=True)
        due = time.monotonic() - self._saved_s >= self._config.compute.checkpoint_s
        if self._world.is_main and (last or wanted or due):
            self._save(end.stage, end.state())
        if last:
            self._checkpoints.flush()  # the hook's checkpoint is then this one
        self.position = self._world.broadcast(self.position)  # any rank may have to say it
        self._hook(row, self._checkpoints.newest_path)
        if self._tracking is not None:
            self._tracking.log(row | {"checkpoint_s": self._checkpoints.write_s})
        self._leave(wanted)

    def waiting(self, stage: str) -> Callable[[str], None]:
        """To be called on every rank while another run trains a stage that this one needs: shows it, and heeds a
        request to stop."""

        def wait(other: str) -> None:
            if self._world.is_main:
                self.progress.say(stage, f"{stage}: waiting for {other}, which trains it")
            self._leave(self._poller.poll(now=True))

        return wait

    def _measure(self, end: EpochEnd, last: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        every = self._config.evaluate_every
        if end.stage in self._measures and (last or (every and end.epoch % every == 0)):
            self.measured = self._evaluator.measure(end.model)
            found |= {"clean_acc": self.measured.clean_acc}
            if self.measured.asr is not None:
                found |= {"asr": self.measured.asr, "robust_acc": self.measured.robust_acc}
        if end.kept is not None:
            found |= {k: v for k, v in self._evaluator.count_kept(end.kept).items() if v is not None}
        if self._defender is not None and end.kept is not None and self._world.is_main:
            stability = self._defender.note(end.kept)
            if stability is not None:
                found |= {"split_stability": stability}
            if "clean_acc" in found:
                found |= self._defender.measure(end.model, end.kept)
        return found

    def _save(self, stage: str, state: dict[str, Any]) -> None:
        if self.resumed is not None and self._order.index(stage) < self._order.index(self.resumed["stage"]):
            return  # trained again since its file was lost: the checkpoints of later stages stay
        checkpoint = {"stage": stage, "key": self._keys[stage], "state": state, "rows": self._folder.rows()}
        self._checkpoints.save(checkpoint)
        self.position, self._saved_s = position_of(checkpoint), time.monotonic()

    def _leave(self, wanted: str | None) -> None:
        if wanted == "state" and self._world.is_main:
            logs.event("a node will be preempted", level=logging.WARNING, after=self.position)
        if wanted is None or wanted == "state":
            return
        logs.event("stop requested", by=wanted, after=self.position)
        self.close()
        raise Stopped.at(wanted, self.position, self._folder.path)

    def close(self) -> None:
        """Wait for checkpoints, and remove the progress file."""
        self._checkpoints.flush()
        if self._world.is_main:
            self.progress.remove()

    def close_profile(self) -> None:
        """Write the trace of the last stage."""
        if self._profile is not None:
            self._profile.close()


def position_of(checkpoint: dict[str, Any]) -> str:
    """Where a checkpoint is, for people: "mixmatch, epoch 3, step 20"."""
    state = checkpoint["state"]
    if state.get("step"):
        return f"{checkpoint['stage']}, epoch {state['epoch'] + 1}, step {state['step']}"
    return f"{checkpoint['stage']}, epoch {state['epoch']}"
