"""One run from data set to result: a loop over the stages of its method, each found by its hash, resumed, or trained.

The same function under Ray Train, torchrun and plain Python; every rank calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig
from dbd_dist.data.loaders import open_images
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.defender import Defender
from dbd_dist.evaluation.evaluator import Evaluator
from dbd_dist.models.given import read_given
from dbd_dist.runtime import lease, logs, watchdog
from dbd_dist.runtime.checkpoint import (
    STATE_FILE,
    Checkpoints,
    StageStore,
    on_cpu,
    remove_stale_temp_files,
    retry_on_oserror,
)
from dbd_dist.runtime.computing import compiles, set_threads, use_cuda_graphs, uses_bf16
from dbd_dist.runtime.keys import stage_keys
from dbd_dist.runtime.mirror import Mirror
from dbd_dist.runtime.profiling import Profile
from dbd_dist.runtime.reporter import START, Hook, Reporter, position_of
from dbd_dist.runtime.results import Results
from dbd_dist.runtime.run_folder import RunFolder
from dbd_dist.runtime.stopping import StopRequest
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import Diverged
from dbd_dist.stages.stage import Stage
from dbd_dist.tracking import TRACKERS, RunInfo, Tracker, Tracking

log = logging.getLogger(__name__)


def check(config: TrainConfig, dataset: Dataset, workers: int) -> None:
    """What can be refused before anything starts.

    Raises:
        UserError: the configuration does not fit the data set or the number of workers.
    """
    manifest = dataset.manifest
    config.method.check_clean(manifest.counts, dataset.folder)
    config.model.check_image_px(manifest.image_px, dataset.folder)
    for stage in config.stages:
        images = manifest.counts["holdout" if stage.on_clean else "train"]
        stage.check(images, manifest.image_px, workers, config.method.stages())
        stage.check_network(config.model)


def run(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    stages_root: Path,
    world: World,
    *,
    request: StopRequest | None = None,
    hook: Hook = lambda row, checkpoint: None,
    trackers: Sequence[Tracker] = (),
) -> dict[str, Any] | None:
    """Run `config` to its end, resuming from the newest checkpoint.

    Args:
        request: tells whether somebody wants the run to stop.
        hook: see `reporter.Hook`.
        trackers: to be given every row too, in rank 0, besides those that the configuration names.

    Returns:
        The result (also in result.json); None where `config.stop_after` ends the run before there is one.

    Raises:
        Stopped: on request, with a checkpoint to resume from.
        UserError: a loss that is not finite, no memory, or storage that cannot be written.
    """
    done = folder.result()
    if done is not None:
        return done
    check(config, dataset, world.size)
    set_threads(config.compute, world)
    patience = config.compute.patience_s
    mirror = None
    if config.compute.mirror is not None and world.is_main:
        mirror = Mirror(config.compute.mirror, stages_root.parent)
    if world.is_main:
        retry_on_oserror(folder.hold, folder.path, patience)
    safe: dict[str, Any] = {"mirror": mirror, "patience_s": patience, "check": folder.check}
    checkpoints = Checkpoints(folder.checkpoints, is_main=world.is_main, **safe)
    store = StageStore(stages_root, **safe)
    runner = None
    try:
        request = request or StopRequest(folder.stop)
        runner = Runner(config, dataset, folder, world, checkpoints, store, request, hook, trackers)
        if world.is_main:
            for place in (folder.path, folder.checkpoints):
                if place.exists():
                    remove_stale_temp_files(place)
            if mirror is not None:
                fetch(mirror, folder, checkpoints, store, runner.keys)
        return runner.run()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, runner) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says it of the CPU's
            raise
        raise _out_of_memory(error, runner) from error
    finally:
        checkpoints.close()
        if runner is not None:
            runner.close()


def _track(config: TrainConfig, folder: RunFolder, others: Sequence[Tracker]) -> Tracking:
    """The trackers that the configuration names, and others. For rank 0."""
    info = RunInfo(name=folder.path.name, folder=folder.path, config=config.to_dict())
    kinds = [TRACKERS.find(name, where="--compute.log") for name in config.compute.log]
    return Tracking(kinds, info, others)


def fetch(mirror: Mirror, folder: RunFolder, checkpoints: Checkpoints, store: StageStore, keys: dict[str, str]) -> None:
    """Get checkpoints and stages back that are in the mirror and not here, or damaged here. For rank 0.

    Raises:
        UserError: the mirror is out of reach, and this run has no checkpoint to resume from without it.
    """
    alone = checkpoints.newest() is None
    try:
        mirror.check()
        if alone:
            for path in mirror.fetch(folder.checkpoints, pattern="checkpoint_*.pt", replace=True):
                logs.event("checkpoint fetched", path=str(path), mirror=mirror.uri)
        for stage, key in keys.items():
            mirror.fetch(store.path(stage, key).parent, pattern=STATE_FILE)
    except UserError as error:
        if alone:
            raise
        log.warning("%s", error)


def _out_of_memory(error: BaseException, runner: Runner | None) -> UserError:
    """What to say when memory runs out."""
    text = str(error).strip() or type(error).__name__
    return UserError(
        f"out of memory ({text.splitlines()[0]})",
        where=f"after {runner.reporter.position if runner else START}",
        hint="use --simclr.chunk, more workers, a smaller --compute.resident-gib, or smaller batches, which "
        "need another --name",
    )


class Runner:
    """A run on its way through the stages."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder,
        world: World,
        checkpoints: Checkpoints,
        store: StageStore,
        request: StopRequest,
        hook: Hook,
        trackers: Sequence[Tracker],
    ):
        self._config, self._folder, self._world = config, folder, world
        self._checkpoints, self._store = checkpoints, store
        compute = config.compute
        self._bf16 = not world.all_reduce_max([0.0 if uses_bf16(compute, world.device) else 1.0])[0]  # all ranks can
        self._dataset = dataset
        self.keys = self._keys(self._bf16)
        reading: Any = {"resident_gib": compute.resident_gib, "threads": torch.get_num_threads()}
        images, holdout = open_images(dataset, world.device, **reading), None
        if config.method.needs_clean:
            holdout = open_images(dataset, world.device, **reading, split="holdout")
        evaluator = Evaluator(dataset, world, config.normalise, bf16=self._bf16)
        defender = None
        if compute.defender_metrics:
            share = max(getattr(stage, "withhold", 0.0) for stage in config.method.stages())
            defender = Defender(
                images, world.device, config.normalise, seed=config.seed, withhold=share, bf16=self._bf16
            )
        profile = None
        if compute.profile is not None and world.is_main:
            profile = Profile(folder.path, compute.profile, world.device)
        self._tracking = _track(config, folder, trackers) if world.is_main else None
        self.reporter = Reporter(
            config, folder, world, evaluator, checkpoints, self.keys, request, hook, defender, self._tracking, profile
        )
        self._context = Context(
            world=world,
            images=images,
            holdout=holdout,
            num_classes=dataset.manifest.num_classes,
            model=config.model,
            start=None if config.model.weights is None else read_given(config.model).tensors,
            normalise=config.normalise,
            seed=config.seed,
            bf16=self._bf16,
            sync_bn=compute.sync_bn,
            compile=compiles(compute, world.device),
            cuda_graphs=use_cuda_graphs(compute, world),
            report=self.reporter.report,
            tick=watchdog.ticking(self.reporter.progress.tick if world.is_main else None),
            after_step=self.reporter.after_step,
        )
        self._results = Results(
            config=config, dataset=dataset, folder=folder, context=self._context, evaluator=evaluator
        )

    def close(self) -> None:
        """Write the trace of the last stage; tell the trackers that the run has ended."""
        self.reporter.close_profile()
        if self._tracking is not None:
            self._tracking.finish(self._folder.result())

    def run(self) -> dict[str, Any] | None:
        """Every stage that is left, and the result."""
        self._resume()
        try:
            return self._stages()
        except Diverged as error:
            self._checkpoints.flush()
            position = self.reporter.position
            kept = f"; the checkpoint before it is kept in {self._folder.checkpoints} ({position})"
            if position == START:
                kept = "; there is no checkpoint before it"
            raise Diverged(error.what, where=error.where, hint=f"{error.hint}{kept}") from error

    def _resume(self) -> None:
        """Find the checkpoint to resume from, the same on all ranks, and put the log of metrics back to it."""
        newest = self._checkpoints.newest() if self._world.is_main else None
        name = self._world.broadcast(newest[0] if newest else None)
        if name is not None:
            saved = newest[1] if newest else self._checkpoints.read(name)
            if saved["key"] != self.keys.get(saved["stage"]):  # all ranks see the same; nothing is trained over it
                raise self._other(name, saved)
            self.reporter.resume_from(saved)
            logs.event("resumed", checkpoint=name, after=position_of(saved))
        if self._world.is_main:
            self._restore_rows(self.reporter.resumed["rows"] if self.reporter.resumed else [])

    def _keys(self, bf16: bool) -> dict[str, str]:
        return stage_keys(self._config, self._dataset, bf16=bf16, workers=self._world.size)

    def _other(self, name: str, saved: dict[str, Any]) -> UserError:
        """What to say of a checkpoint whose key is not this run's."""
        if saved["key"] == self._keys(not self._bf16).get(saved["stage"]):
            what = f"{name} was made in another precision (auto is {'bf16' if self._bf16 else 'fp32'} here)"
            hint = "resume on hardware like the first, or choose another --name"
        else:
            workers = "" if self._config.compute.sync_bn else ", another number of workers"
            what = (
                f"{name} is of another run (other data, another seed, other settings{workers}), or of another version "
                "of this program"
            )
            hint = "take it out of the folder, resume with that version, or choose another --name"
        return UserError(what, where=self._folder.checkpoints, hint=hint)

    def _restore_rows(self, rows: list[dict[str, Any]]) -> None:
        retry_on_oserror(lambda: self._folder.restore(rows), self._folder.path, self._config.compute.patience_s)

    def _stages(self) -> dict[str, Any] | None:
        config, world = self._config, self._world
        given: dict[str, Any] = {}
        last = config.method.trained()[-1]
        for stage in config.method.stages():
            given |= stage.offers()
            if stage.trains:
                self.reporter.measured = None  # of an earlier stage
                if stage is not last or stage.kept_when_last:
                    found = self._find(stage) or self._share(stage, given)
                else:
                    found = self._train(stage, given, store=False)
                measures = given.get("measures", {}) | found.get("measures", {})
                given |= {**found, "measures": measures}
            if "backbone" in stage.gives and world.is_main:
                self._results.backbone(given["backbone"])
            if config.stop_after == stage.name:
                world.barrier()  # what rank 0 has written is there for all
                self.reporter.close()
                return None
        said = self.reporter.progress.saying("all stages are trained; measuring the result")
        with said if world.is_main else nullcontext():
            measured = None if config.method.changes_input else self.reporter.measured
            measured = measured or self._results.measure(given)
            features, ranking = self._results.judge_features(given), self._results.rank_samples(given)
            if world.is_main:
                self._checkpoints.flush()
                self._results.finish(given, measured, features, ranking)
        if world.is_main:
            self.reporter.progress.remove()
        world.barrier()
        return self._folder.result()

    def _find(self, stage: Stage) -> dict[str, Any] | None:
        """What a stage gave that this or another run has finished; None where it has to be trained."""
        # one rank looks: another run may finish the stage between two ranks' looks
        if not self._world.broadcast(self._store.has(stage.name, self.keys[stage.name])):
            return None
        stored = self._store.load(stage.name, self.keys[stage.name])
        rows = stored.pop("rows")
        own = len(self._folder.rows(stage.name))  # fewer where another run finished what this one had begun
        if self._world.is_main and own < len(rows):
            self._forget_rows(stage)
            for at, row in enumerate(rows):
                self._folder.log(row | ({"reused": True} if at >= own else {}))
        return stored

    def _train(self, stage: Stage, given: dict[str, Any], *, store: bool) -> dict[str, Any]:
        """Train a stage, from its checkpoint where there is one; keep what it gives for other runs where asked."""
        state = self.reporter.state_of(stage.name)
        if state is None and store:  # it may have been finished once, and its file been lost since
            self._forget_rows(stage)
        found = on_cpu(stage.run(self._context, given, state))
        if store:
            self._checkpoints.flush()  # the rows of its last epoch are on disk before others find the stage
            if self._world.is_main:
                rows = [{k: v for k, v in row.items() if k != "reused"} for row in self._folder.rows(stage.name)]
                self._store.save(stage.name, self.keys[stage.name], {**found, "rows": rows})
            self._world.barrier()
        return found

    def _share(self, stage: Stage, given: dict[str, Any]) -> dict[str, Any]:
        """Train a stage for this and other runs, or wait for the run that trains it already."""
        key = self.keys[stage.name]
        with lease.held(
            self._store.path(stage.name, key).with_name(lease.FILE),
            holder=self._folder.path.name,
            world=self._world,
            finished=lambda: self._is_stored(stage),
            between=self.reporter.waiting(stage.name),
        ) as mine:
            found = None if mine else self._find(stage)
            return self._train(stage, given, store=True) if found is None else found

    def _is_stored(self, stage: Stage) -> bool:
        """Is a stage in the store, of the storage that the run began on? For rank 0."""
        retry_on_oserror(self._folder.check, self._folder.path, self._config.compute.patience_s)
        return self._store.has(stage.name, self.keys[stage.name])

    def _forget_rows(self, stage: Stage) -> None:
        if self._world.is_main and self._folder.rows(stage.name):
            self._restore_rows([row for row in self._folder.rows() if row["stage"] != stage.name])
