"""One run from data set to result: the stages in order, each skipped where it is already done.

The same function under Ray Train, torchrun and plain Python; every rank calls it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.errors import UserError
from data_prep.manifest import Dataset
from dbd_dist import seeds
from dbd_dist.checkpoint import Checkpoints, StageStore
from dbd_dist.config import TrainConfig, digest, to_dict
from dbd_dist.evaluate import Examiner, Measured, pooled_features
from dbd_dist.loaders import Images, open_images
from dbd_dist.models import Classifier, ContrastiveModel, seeded
from dbd_dist.progress import ProgressFile
from dbd_dist.runfolder import RunFolder, describe, method_hash
from dbd_dist.stages import mixmatch, simclr, supervised, warmup
from dbd_dist.stages.context import Context, EpochEnd
from dbd_dist.world import World

FEATURE_SAMPLES = 2000
REVISION = 2
"""Counted up whenever a change of the code changes what a stage computes: stages stored before are not reused then."""
ORDER = {"simclr": 0, "warmup": 1, "mixmatch": 2, "supervised": 0}


def check(config: TrainConfig, dataset: Dataset, workers: int) -> None:
    """What can be refused before anything starts.

    Raises:
        UserError: the configuration does not fit the data set or the number of workers.
    """
    manifest = dataset.manifest
    count = manifest.counts["train"]
    if manifest.image_px < config.model.min_image_px:
        raise UserError(
            f"images of {manifest.image_px} px are too small for a network of {len(config.model.widths)} stages with "
            f"the {config.model.stem} stem",
            where=dataset.folder,
            allowed=f"at least {config.model.min_image_px} px",
            fix="use --model.stem cifar or fewer --model.widths, or prepare larger images",
        )
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
                allowed=f"at most {limit}",
            )
        if batch % workers or batch // workers < 2:
            raise UserError(
                f"a batch of {batch} cannot be shared equally by {workers} workers",
                where=f"{stage}.batch",
                allowed=f"a multiple of {workers}, at least {2 * workers}",
            )
    chunk = config.simclr.chunk
    if "simclr" in stages and chunk is not None and chunk % workers:
        raise UserError(
            f"chunks of {chunk} cannot be shared equally by {workers} workers",
            where="simclr.chunk",
            allowed=f"a multiple of {workers}",
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


def records(config: TrainConfig, world: World) -> bool:
    """Whether to replay MixMatch's step as a CUDA graph: one rank, on a GPU, unless switched off."""
    return world.device.type == "cuda" and world.size == 1 and config.compute.cuda_graphs != "off"


def run(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    stages_root: Path,
    world: World,
    checkpoints: Checkpoints,
) -> dict[str, Any] | None:
    """Run `config` to its end, going on from the newest checkpoint.

    Returns:
        The result (also in result.json); None where `config.stop_after` ends the run before there is one.
    """
    done = folder.result()
    if done is not None:
        return done
    check(config, dataset, world.size)
    threads = config.compute.threads or _threads(world)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # on CUDA alone: batches have a handful of shapes
    return _Run(config, dataset, folder, stages_root, world, checkpoints).go()


def _threads(world: World) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return max(cores // here, 1)


class _Run:
    """The state of one run while it goes through its stages."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder,
        stages_root: Path,
        world: World,
        checkpoints: Checkpoints,
    ):
        self.config, self.dataset, self.folder, self.world = config, dataset, folder, world
        self.store, self.checkpoints = StageStore(stages_root), checkpoints
        self.bf16 = uses_bf16(config, world.device)
        self.images: Images = open_images(
            dataset, world.device, resident_gib=config.compute.resident_gib, threads=torch.get_num_threads()
        )
        self.examiner = Examiner(dataset, world, config.normalise, bf16=self.bf16)
        self.progress = ProgressFile(folder.progress)
        self.context = Context(
            world=world,
            images=self.images,
            num_classes=dataset.manifest.num_classes,
            seed=config.seed,
            bf16=self.bf16,
            sync_bn=config.compute.sync_bn,
            compile=compiles(config, world.device),
            cuda_graphs=records(config, world),
            report=self._report,
            tick=self.progress.tick if world.is_main else lambda *_: None,
        )
        self.measured: Measured | None = None
        self.keys = self._keys()
        saved = checkpoints.latest()
        self.saved = saved if saved and saved["key"] == self.keys.get(saved["stage"]) else None
        if world.is_main:
            folder.path.mkdir(parents=True, exist_ok=True)
            at = (-1, 0) if self.saved is None else (ORDER[self.saved["stage"]], self.saved["state"]["epoch"])
            folder.keep_rows(lambda row: (ORDER[row["stage"]], row["epoch"]) <= at)

    def _keys(self) -> dict[str, str]:
        """For every stage a hash over exactly what it depends on."""
        values = to_dict(self.config)
        surroundings = {
            "revision": REVISION,
            "data": self.dataset.manifest.data_hash,
            "seed": self.config.seed,
            "model": values["model"],
            "bf16": self.bf16,
            "sync_bn": self.config.compute.sync_bn,
        }
        keys = {"simclr": digest([surroundings, values["simclr"]])}
        keys["warmup"] = digest([keys["simclr"], values["warmup"]])
        keys["mixmatch"] = digest([keys["warmup"], values["split"], values["mixmatch"]])
        keys["supervised"] = digest([surroundings, values["supervised"]])
        return keys

    # -- what happens at the end of an epoch

    def _report(self, end: EpochEnd) -> None:
        row: dict[str, Any] = {"stage": end.stage, "epoch": end.epoch, "epochs": end.epochs, **end.metrics}
        every = self.config.evaluate_every
        if end.stage in ("mixmatch", "supervised") and (end.epoch == end.epochs or (every and end.epoch % every == 0)):
            self.measured = self.examiner.measure(end.model)
            row |= {"clean_acc": self.measured.clean_acc}
            if self.measured.asr is not None:
                row |= {"asr": self.measured.asr, "robust_acc": self.measured.robust_acc}
        if end.kept is not None:
            row |= {k: v for k, v in self.examiner.count_kept(end.kept).items() if v is not None}
        if self.world.is_main:
            self.folder.log(row)
            self.progress.note(row)
        self.checkpoints.save({"stage": end.stage, "key": self.keys[end.stage], "state": end.state()}, row)

    def _resume(self, stage: str) -> dict[str, Any] | None:
        return self.saved["state"] if self.saved and self.saved["stage"] == stage else None

    # -- stages

    def _load(self, stage: str) -> dict[str, Any] | None:
        """A stage that this or another run has finished; None where it has to be trained."""
        # one rank looks: another run may finish the stage between two ranks' looks
        if not self.world.broadcast(self.store.has(stage, self.keys[stage])):
            if self.world.is_main and self._resume(stage) is None:
                self.folder.keep_rows(lambda row: row["stage"] != stage)
            return None
        state = self.store.load(stage, self.keys[stage])
        if self.world.is_main and not self.folder.rows(stage):
            for row in state["rows"]:
                self.folder.log(row | {"reused": True})
        return state

    def _keep(self, stage: str, state: dict[str, Any]) -> None:
        if self.world.is_main:
            rows = [{k: v for k, v in row.items() if k != "reused"} for row in self.folder.rows(stage)]
            self.store.save(stage, self.keys[stage], {**state, "rows": rows})
        self.world.barrier()

    def _pretrained(self) -> dict[str, Any]:
        """Stage 1: the backbone's weights."""
        state = self._load("simclr")
        if state is None:
            weights = seeds.generator(self.config.seed, "simclr", "weights")
            model = self.context.prepare(seeded(lambda: ContrastiveModel(self.config.model), weights))
            simclr.pretrain(self.config.simclr, model, self.context, self._resume("simclr"))
            state = {"backbone": _on_cpu(model.backbone.state_dict())}
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
            optimizer = warmup.train_head(self.config.warmup, model, self.context, self._resume("warmup"))
            state = {"model": _on_cpu(model.state_dict()), "optimizer": optimizer.state_dict()}
            self._keep("warmup", state)
        model.load_state_dict(state["model"])
        return model, state["optimizer"]

    def go(self) -> dict[str, Any] | None:
        config = self.config
        split: dict[str, torch.Tensor] | None = None
        if config.method == "none":
            model = self.context.prepare(self._classifier("supervised"))
            supervised.train(config.supervised, model, self.context, self._resume("supervised"))
            features = model.backbone
        else:
            backbone = self._pretrained()
            if self.world.is_main:
                self.folder.write_backbone(backbone, config, self.dataset, config.normalise)
            if config.stop_after == "simclr":
                return self._stopped()
            model, optimizer = self._warmed_up(backbone)
            if config.stop_after == "warmup":
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
        if self.world.is_main:
            self.progress.remove()

    def _finish(
        self, model: Classifier, features: nn.Module, split: dict[str, torch.Tensor] | None
    ) -> dict[str, Any] | None:
        """Measure the finished model and write everything that the run leaves behind."""
        config, manifest, world = self.config, self.dataset.manifest, self.world
        measured = self.measured or self.examiner.measure(model)
        counts = self.examiner.count_kept(
            torch.zeros(len(self.images), dtype=torch.bool) if split is None else split["kept"]
        )
        if split is None:
            counts |= {"kept": None, "kept_poisoned": None}
        if world.is_main:
            if split is not None:
                self.folder.write_split(split)
            chosen = seeds.generator(config.seed, "features")
            positions = torch.randperm(len(self.images), generator=chosen)[:FEATURE_SAMPLES].sort().values
            pixels = next(iter(self.images.batches([positions])))
            kind = "supervised" if split is None else "ssl"
            self.folder.write_features(positions, pooled_features(features, pixels, config.normalise), kind)
            self.folder.write_model(model, config, self.dataset, config.normalise)
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
            self.folder.write_result(result)
            self.progress.remove()
        world.barrier()
        return self.folder.result()


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
