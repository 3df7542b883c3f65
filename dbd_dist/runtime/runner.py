"""One run from data set to result: the stages in order, each skipped where it is already done.

The same function under Ray Train, torchrun and plain Python; every rank calls it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.config import TrainConfig, digest, to_dict
from dbd_dist.data.loaders import Images, open_images
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.evaluator import EvalResult, Evaluator, pooled_features
from dbd_dist.models.given import load_backbone_weights, model_key
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded
from dbd_dist.runtime import logs, watchdog
from dbd_dist.runtime.checkpoint import (
    STATE_FILE,
    Checkpoints,
    StageStore,
    on_cpu,
    remove_stale_temp_files,
    retry_on_oserror,
)
from dbd_dist.runtime.mirror import Mirror
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.run_folder import RunFolder, describe, method_hash
from dbd_dist.runtime.stopping import Stopped, StopPoller, StopRequest
from dbd_dist.stages import mixmatch, simclr, supervised, warmup
from dbd_dist.stages.context import Context, Diverged, EpochEnd, StepEnd

FEATURE_SAMPLES = 2000
START = "the start"
log = logging.getLogger(__name__)

REVISION = 3
STAGES = ("simclr", "warmup", "mixmatch", "supervised")
"""Counted up whenever a change of the code changes what a stage computes: stages stored before are not reused then."""


def check(config: TrainConfig, dataset: Dataset, workers: int) -> None:
    """What can be refused before anything starts.

    Raises:
        UserError: the configuration does not fit the data set or the number of workers.
    """
    manifest = dataset.manifest
    count = manifest.counts["train"]
    config.model.check_image_px(manifest.image_px, dataset.folder)
    config.check_image_px(manifest.image_px)
    stages = ("supervised",) if config.method == "none" else ("simclr", "warmup", "mixmatch")
    for stage in stages:
        batch = getattr(config, stage).batch
        limit = count
        if stage == "mixmatch":
            kept = round(config.split.keep * count)
            limit = min(kept, count - kept)
        if batch > limit:
            what = "samples on the smaller side of the split" if stage == "mixmatch" else "training images"
            raise UserError(
                f"a batch of {batch} is larger than the data set: {limit} {what}",
                where=f"{stage}.batch",
                expected=f"at most {limit}",
            )
        if batch % workers or batch // workers < 2:
            raise UserError(
                f"a batch of {batch} cannot be shared equally by {workers} workers",
                where=f"{stage}.batch",
                expected=f"a multiple of {workers}, at least {2 * workers}",
            )
    chunk = config.simclr.chunk
    if "simclr" in stages and chunk is not None and chunk % workers:
        raise UserError(
            f"chunks of {chunk} cannot be shared equally by {workers} workers",
            where="simclr.chunk",
            expected=f"a multiple of {workers}",
        )


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16: asked for, or left to us and the device has instructions for it."""
    if config.compute.precision != "auto":
        return config.compute.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()  # without them, bfloat16 is several times slower than float32


def compiles(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compile networks: asked for, or left to us and the device is a GPU with a compiler beside it."""
    if config.compute.compile != "auto":
        return config.compute.compile == "on"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def use_cuda_graphs(config: TrainConfig, world: World) -> bool:
    """Whether to replay MixMatch's step as a CUDA graph: one rank, on a GPU, unless switched off."""
    return world.device.type == "cuda" and world.size == 1 and config.compute.cuda_graphs != "off"


def run(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    stages_root: Path,
    world: World,
    *,
    request: StopRequest | None = None,
    note: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Run `config` to its end, going on from the newest state.

    Args:
        request: tells whether somebody wants the run to stop.
        note: is given every row of the metrics, on all ranks.

    Returns:
        The result (also in result.json); None where `config.stop_after` ends the run before there is one.

    Raises:
        Stopped: on request, with a state to go on from.
        UserError: a loss that is not finite, no memory, or storage that cannot be written.
    """
    done = folder.result()
    if done is not None:
        return done
    check(config, dataset, world.size)
    threads = config.compute.threads or _threads(world)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # on CUDA alone: batches have a handful of shapes
    patience = config.compute.patience_s
    mirror = None
    if config.compute.mirror is not None and world.is_main:
        mirror = Mirror(config.compute.mirror, stages_root.parent)
    checkpoints = Checkpoints(folder.checkpoints, is_main=world.is_main, mirror=mirror, patience_s=patience)
    store = StageStore(stages_root, mirror=mirror, patience_s=patience)
    request = request or StopRequest(folder.stop)
    the_run = None
    try:
        the_run = _Run(config, dataset, folder, world, checkpoints, store, request, note)
        if world.is_main:
            the_run.tidy()
            if mirror is not None:
                the_run.fetch(mirror)
        return the_run.go()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error, the_run) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says it of the CPU's
            raise
        raise _out_of_memory(error, the_run) from error
    finally:
        checkpoints.close()


def _threads(world: World) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(cores // here, 1)


def _out_of_memory(error: BaseException, the_run: _Run | None) -> UserError:
    """What to tell when memory runs out."""
    text = str(error).strip() or type(error).__name__
    return UserError(
        f"out of memory ({text.splitlines()[0]})",
        where=f"after {the_run.at if the_run else START}",
        hint="use --simclr.chunk, more workers, a smaller --compute.resident-gib, or smaller batches, which "
        "need another --name",
    )


class _Run:
    """The state of one run while it goes through its stages."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder,
        world: World,
        checkpoints: Checkpoints,
        store: StageStore,
        request: StopRequest,
        note: Callable[[dict[str, Any]], None],
    ):
        self.config, self.dataset, self.folder, self.world = config, dataset, folder, world
        self.store, self.checkpoints, self.note = store, checkpoints, note
        self.stop_poller = StopPoller(world, request)
        self.bf16 = not world.all_reduce_max([0.0 if uses_bf16(config, world.device) else 1.0])[
            0
        ]  # where all ranks can
        self.images: Images = open_images(
            dataset, world.device, resident_gib=config.compute.resident_gib, threads=torch.get_num_threads()
        )
        self.evaluator = Evaluator(dataset, world, config.normalise, bf16=self.bf16)
        self.progress = ProgressFile(folder.progress)
        self.context = Context(
            world=world,
            images=self.images,
            num_classes=dataset.manifest.num_classes,
            seed=config.seed,
            bf16=self.bf16,
            sync_bn=config.compute.sync_bn,
            compile=compiles(config, world.device),
            cuda_graphs=use_cuda_graphs(config, world),
            report=self._report,
            tick=watchdog.ticking(self.progress.tick if world.is_main else None),
            after_step=self._after_step,
        )
        self.measured: EvalResult | None = None
        self.keys = self._keys()
        self.saved: dict[str, Any] | None = None
        self.at = START
        self.saved_s = time.monotonic()

    def tidy(self) -> None:
        """Remove what a killed process left aside. For rank 0."""
        for folder in (self.folder.path, self.folder.checkpoints):
            if folder.exists():
                remove_stale_temp_files(folder)

    def fetch(self, mirror: Mirror) -> None:
        """Get states back that are in the mirror and not here, or damaged here. For rank 0.

        Raises:
            UserError: the mirror is out of reach, and this run has no state to go on from without it.
        """
        alone = self.checkpoints.newest() is None
        try:
            mirror.check()
            if alone:
                for path in mirror.fetch(self.folder.checkpoints, pattern="checkpoint_*.pt", replace=True):
                    logs.event("checkpoint fetched", path=str(path), mirror=mirror.uri)
            for stage in ("simclr", "warmup"):
                mirror.fetch(self.store.path(stage, self.keys[stage]).parent, pattern=STATE_FILE)
        except UserError as error:
            if alone:
                raise
            log.warning("%s", error)

    def _go_on(self) -> None:
        """Find the state to go on from, the same on all ranks, and put the log of metrics back to it."""
        newest = self.checkpoints.newest() if self.world.is_main else None
        name = self.world.broadcast(newest[0] if newest else None)
        if name is not None:
            saved = newest[1] if newest else self.checkpoints.read(name)
            if saved["key"] != self.keys.get(saved["stage"]):  # all ranks see the same; nothing is trained over it
                raise UserError(
                    f"{name} was made in another precision (auto is {'bf16' if self.bf16 else 'fp32'} here), or by "
                    "another version of this program",
                    where=self.folder.checkpoints,
                    hint="go on with that version, on hardware like the first, or choose another --name",
                )
            self.saved = saved
            self.at = _position(saved)
            logs.event("resumed", checkpoint=name, after=self.at)
        if self.world.is_main:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            rows = self.saved["rows"] if self.saved else []
            retry_on_oserror(lambda: self.folder.restore(rows), self.folder.path, self.config.compute.patience_s)

    def _keys(self) -> dict[str, str]:
        """For every stage a hash over exactly what it depends on."""
        values = to_dict(self.config)
        surroundings = {
            "revision": REVISION,
            "data": self.dataset.manifest.data_hash,
            "seed": self.config.seed,
            "model": model_key(self.config.model),
            "bf16": self.bf16,
            "sync_bn": self.config.compute.sync_bn,
        }
        keys = {"simclr": digest([surroundings, values["simclr"]])}
        keys["warmup"] = digest([keys["simclr"], values["warmup"]])
        keys["mixmatch"] = digest([keys["warmup"], values["split"], values["mixmatch"]])
        keys["supervised"] = digest([surroundings, values["supervised"]])
        return keys

    # -- what happens between steps and epochs

    def _save(self, stage: str, state: dict[str, Any]) -> None:
        if self.saved is not None and STAGES.index(stage) < STAGES.index(self.saved["stage"]):
            return  # trained again since its file was lost: the states of what follows stay
        saved = {"stage": stage, "key": self.keys[stage], "state": state, "rows": self.folder.rows()}
        self.checkpoints.save(saved)
        self.at, self.saved_s = _position(saved), time.monotonic()

    def _after_step(self, end: StepEnd) -> None:
        every = self.config.compute.checkpoint_steps
        wanted = self.stop_poller.poll()
        if wanted or (every and end.step % every == 0):
            self._save(end.stage, end.state())
        self._leave(wanted)

    def _leave(self, wanted: str | None) -> None:
        if wanted == "state" and self.world.is_main:
            logs.event("a node is about to be taken away", level=logging.WARNING, after=self.at)
        if wanted is None or wanted == "state":
            return
        logs.event("stop requested", by=wanted, after=self.at)
        self.checkpoints.flush()
        self._stopped()
        raise Stopped.at(wanted, self.at, self.folder.path)

    def _report(self, end: EpochEnd) -> None:
        row: dict[str, Any] = {"stage": end.stage, "epoch": end.epoch, "epochs": end.epochs, **end.metrics}
        if not self.config.compute.sync_bn:
            self.world.broadcast_buffers(end.model)  # what is measured and saved is then every rank's
        last, every = end.epoch == end.epochs, self.config.evaluate_every
        if end.stage in ("mixmatch", "supervised") and (last or (every and end.epoch % every == 0)):
            self.measured = self.evaluator.measure(end.model)
            row |= {"clean_acc": self.measured.clean_acc}
            if self.measured.asr is not None:
                row |= {"asr": self.measured.asr, "robust_acc": self.measured.robust_acc}
        if end.kept is not None:
            row |= {k: v for k, v in self.evaluator.count_kept(end.kept).items() if v is not None}
        if self.world.is_main:
            self.folder.log(row)
            self.progress.note(row)
        wanted = self.stop_poller.poll(now=True)
        if self.world.is_main and (
            last or wanted or time.monotonic() - self.saved_s >= self.config.compute.checkpoint_s
        ):
            self._save(end.stage, end.state())
        self.at = self.world.broadcast(self.at)  # any rank may have to say it
        self.note(row)
        self._leave(wanted)

    def _resume(self, stage: str) -> dict[str, Any] | None:
        return self.saved["state"] if self.saved and self.saved["stage"] == stage else None

    # -- stages

    def _load(self, stage: str) -> dict[str, Any] | None:
        """A stage that this or another run has finished; None where it has to be trained."""
        # one rank looks: another run may finish the stage between two ranks' looks
        if not self.world.broadcast(self.store.has(stage, self.keys[stage])):
            return None
        state = self.store.load(stage, self.keys[stage])
        own = len(self.folder.rows(stage))  # fewer where another run finished what this one had begun
        if self.world.is_main and own < len(state["rows"]):
            self._forget_rows(stage)
            for at, row in enumerate(state["rows"]):
                self.folder.log(row | ({"reused": True} if at >= own else {}))
        return state

    def _forget_rows(self, stage: str) -> None:
        if self.world.is_main and self.folder.rows(stage):
            rows = [row for row in self.folder.rows() if row["stage"] != stage]
            retry_on_oserror(lambda: self.folder.restore(rows), self.folder.path, self.config.compute.patience_s)

    def _begin(self, stage: str) -> dict[str, Any] | None:
        """The state to go on from in a stage that has to be trained; None at its beginning."""
        state = self._resume(stage)
        if state is None:  # it may have been finished once, and its file been lost since
            self._forget_rows(stage)
        return state

    def _keep(self, stage: str, state: dict[str, Any]) -> None:
        self.checkpoints.flush()  # whoever finds the stage finds its last rows too
        if self.world.is_main:
            rows = [{k: v for k, v in row.items() if k != "reused"} for row in self.folder.rows(stage)]
            self.store.save(stage, self.keys[stage], {**state, "rows": rows})
        self.world.barrier()

    def _pretrained(self) -> dict[str, Any]:
        """Stage 1: the backbone's weights."""
        state = self._load("simclr")
        if state is None:
            weights = seeds.generator(self.config.seed, "simclr", "weights")
            model = seeded(lambda: ContrastiveModel(self.config.model), weights)
            load_backbone_weights(self.config.model, model.backbone)
            model = self.context.prepare(model)
            simclr.pretrain(self.config.simclr, model, self.context, self._begin("simclr"))
            state = {"backbone": on_cpu(model.backbone.state_dict())}
            self._keep("simclr", state)
        return state["backbone"]

    def _classifier(self, name: str) -> Classifier:
        weights = seeds.generator(self.config.seed, name, "weights")
        return seeded(lambda: Classifier(self.config.model, self.dataset.manifest.num_classes), weights)

    def _warmed_up(self, backbone: dict[str, Any]) -> tuple[Classifier, dict[str, Any]]:
        """Stage 2: the classifier, and the state of its optimiser."""
        model = self._classifier("warmup")
        model.backbone.load_state_dict(backbone)
        model = self.context.prepare(model)
        state = self._load("warmup")
        if state is None:
            optimizer = warmup.train_head(self.config.warmup, model, self.context, self._begin("warmup"))
            state = {"model": on_cpu(model.state_dict()), "optimizer": optimizer.state_dict()}
            self._keep("warmup", state)
        model.load_state_dict(state["model"])
        return model, state["optimizer"]

    def go(self) -> dict[str, Any] | None:
        """Every stage that is left, and the result."""
        self._go_on()
        try:
            return self._stages()
        except Diverged as error:
            self.checkpoints.flush()
            kept = f"; the checkpoint before it is kept in {self.folder.checkpoints} ({self.at})"
            if self.at == START:
                kept = "; there is no checkpoint before it"
            raise Diverged(error.what, where=error.where, hint=f"{error.hint}{kept}") from error

    def _stages(self) -> dict[str, Any] | None:
        config = self.config
        split: dict[str, torch.Tensor] | None = None
        if config.method == "none":
            model = self._classifier("supervised")
            load_backbone_weights(config.model, model.backbone)
            model = self.context.prepare(model)
            supervised.train(config.supervised, model, self.context, self._resume("supervised"))
            features = model.backbone
        else:
            backbone = self._pretrained()
            if self.world.is_main:
                self._write(lambda: self.folder.write_backbone(backbone, config, self.dataset, config.normalise))
            if config.stop_after == "simclr":
                self.world.barrier()  # what rank 0 has written is there for all
                return self._stopped()
            model, optimizer = self._warmed_up(backbone)
            if config.stop_after == "warmup":
                self.world.barrier()
                return self._stopped()
            split = mixmatch.fine_tune(
                config.mixmatch,
                config.split,
                config.warmup,
                model,
                optimizer if config.mixmatch.continue_optimizer else None,
                self.context,
                self._resume("mixmatch"),
            )
            features = self._classifier("features").backbone
            features.load_state_dict(backbone)
            features.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._finish(model, features, split)

    def _stopped(self) -> None:
        self.checkpoints.flush()
        if self.world.is_main:
            self.progress.remove()

    def _write(self, write: Callable[[], None]) -> None:
        retry_on_oserror(write, self.folder.path, self.config.compute.patience_s)

    def _finish(
        self, model: Classifier, features: nn.Module, split: dict[str, torch.Tensor] | None
    ) -> dict[str, Any] | None:
        """Measure the finished model and write everything that the run leaves behind."""
        config, manifest, world = self.config, self.dataset.manifest, self.world
        measured = self.measured or self.evaluator.measure(model)
        counts = self.evaluator.count_kept(
            torch.zeros(len(self.images), dtype=torch.bool) if split is None else split["kept"]
        )
        if split is None:
            counts |= {"kept": None, "kept_poisoned": None}
        if world.is_main:
            if split is not None:
                self._write(lambda: self.folder.write_split(split))
            chosen = seeds.generator(config.seed, "features")
            positions = torch.randperm(len(self.images), generator=chosen)[:FEATURE_SAMPLES].sort().values
            pixels = next(iter(self.images.batches([positions])))
            kind = "supervised" if split is None else "ssl"
            pooled = pooled_features(features, pixels, config.normalise)
            self._write(lambda: self.folder.write_features(positions, pooled, kind))
            self._write(lambda: self.folder.write_model(model, config, self.dataset, config.normalise))
            stages = ("supervised",) if split is None else ("simclr", "warmup", "mixmatch")
            result = {
                "method": config.method,
                "preset": config.preset,
                "dataset": manifest.name,
                "data_hash": manifest.data_hash,
                "attack": manifest.attack["kind"],
                "seed": config.seed,
                **dataclasses.asdict(measured),
                **counts,
                "train_size": len(self.images),
                "seconds": {s: round(sum(r["time_s"] for r in self.folder.rows(s)), 2) for s in stages},
                "reused_stages": [s for s in stages if any(r.get("reused") for r in self.folder.rows(s))],
                "config_hash": method_hash(config),
                **describe(world, config, self.bf16),
            }
            self.checkpoints.flush()
            self._write(self.folder.write_rows)
            self._write(lambda: self.folder.write_result(result))
            self.progress.remove()
        world.barrier()
        return self.folder.result()


def _position(saved: dict[str, Any]) -> str:
    """Where a state is, for people: "mixmatch, epoch 3, step 20"."""
    state = saved["state"]
    if state.get("step"):
        return f"{saved['stage']}, epoch {state['epoch'] + 1}, step {state['step']}"
    return f"{saved['stage']}, epoch {state['epoch']}"
