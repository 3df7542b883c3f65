"""Free space on the storage, checked before anything is written: an upper bound on what a run or an artefact writes.

Quotas that the file system does not show as free space are not seen, nor what other programs write meanwhile.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig
from dbd_dist.craft.craft import Craft, TrainingSet
from dbd_dist.models.heads import Classifier, ContrastiveModel
from dbd_dist.runtime.checkpoint import CHECKPOINTS_KEPT
from dbd_dist.runtime.results import FEATURE_SAMPLES
from dbd_dist.stages.stage import NetworkBytes
from dbd_dist.stages.warmup import Warmup

MARGIN = 1.2
"""For what the formulas leave out: containers of the states, blocks of the file system, folders."""
_EPOCH_BYTES = 2048  # metrics.jsonl, event files and log of one epoch
_TEXT_BYTES = 64 << 10  # run.json, result.json and the like


@dataclass(frozen=True, kw_only=True)
class RunBytes:
    """What one run leaves, in bytes."""

    checkpoints: int
    stages: int
    """Finished stages, shared by all runs of a storage."""
    exports: int
    """Weights for people: model.safetensors, backbone.safetensors."""
    tables: int
    """split.parquet or ranking.parquet, features.npz."""
    texts: int
    """metrics.jsonl, event files, descriptions, logs."""

    @property
    def total(self) -> int:
        """With a margin."""
        return int(MARGIN * (self.checkpoints + self.stages + self.exports + self.tables + self.texts))


def of_run(config: TrainConfig, dataset: Dataset) -> RunBytes:
    """The formula for a run: `CHECKPOINTS_KEPT` of its largest checkpoint and one being written, what stages hand on,
    exports, tables.

    Weights take 4 bytes a parameter. A split takes 4 + 1 bytes an image, for each of the two that are kept, and 8 for
    its index; features take 2 bytes a dimension.
    """
    images = dataset.manifest.counts["train"]
    with torch.device("meta"):  # counted, not made
        contrastive = ContrastiveModel(config.model)
        classifier = Classifier(config.model, dataset.manifest.num_classes)
    networks = NetworkBytes(
        backbone=_bytes(classifier.backbone),
        contrastive=_bytes(contrastive),
        classifier=_bytes(classifier),
        head=_bytes(classifier.head),
        split=images * (2 * (4 + 1) + 8),
    )
    stages = config.stages
    sizes = [stage.sizes(networks) for stage in stages]
    given = {name for stage in stages for name in stage.gives}
    last = config.method.trained()[-1]
    features = min(FEATURE_SAMPLES, images) * (2 * config.model.feature_dim + 8)
    tables = features + (networks.split if "split" in given or isinstance(last, Warmup) else 0)
    return RunBytes(
        checkpoints=(CHECKPOINTS_KEPT + 1) * max(size.checkpoint for size in sizes),
        stages=sum(size.kept for stage, size in zip(stages, sizes) if stage is not last or stage.kept_when_last),
        exports=(networks.backbone if "backbone" in given else 0) + (networks.classifier if last in stages else 0),
        tables=tables if last in stages else 0,
        texts=_TEXT_BYTES + sum(getattr(stage, "epochs", 0) for stage in stages) * _EPOCH_BYTES,
    )


def _bytes(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def of_craft(craft: Craft, data: TrainingSet) -> int:
    """What making an artefact takes in bytes."""
    return int(MARGIN * (craft.disk_bytes(data) + _TEXT_BYTES))


def check_run(config: TrainConfig, dataset: Dataset, folder: Path) -> None:
    """Refuse a run that its storage has no room for; what an earlier start of it has left counts as written.

    Raises:
        UserError
    """
    refuse_if_full(folder, of_run(config, dataset).total - used_bytes(folder), f"the run {folder.name}", "--storage")


def check_sweep(configs: Iterable[TrainConfig], dataset: Dataset, folder: Path) -> None:
    """The same for all runs of a sweep together, as if none shared a stage.

    Raises:
        UserError
    """
    needed = sum(of_run(config, dataset).total for config in configs)
    refuse_if_full(folder, needed - used_bytes(folder), f"the sweep {folder.name}", "--storage")


def check_craft(craft: Craft, data: TrainingSet, work: Path) -> None:
    """The same for an artefact that is made in a folder beside it.

    Raises:
        UserError
    """
    refuse_if_full(work, of_craft(craft, data) - used_bytes(work), "the artefact", "--out")


def refuse_if_full(folder: Path, needed: int, what: str, flag: str) -> None:
    """Refuse what a folder's file system has no room for.

    Args:
        folder: may be missing, as may those above it.
        needed: bytes; nothing is refused from 0 down.
        what: is to be written, for the message.
        flag: of the command, that chooses another place.

    Raises:
        UserError
    """
    place = next(above for above in (folder, *folder.parents) if above.exists())
    free = shutil.disk_usage(place).free
    if needed > max(free, 0):
        raise UserError(
            f"{what} needs up to {_text(needed)}, {_text(free)} are free",
            where=place,
            hint=f"make room, or choose another {flag}",
        )


def used_bytes(folder: Path) -> int:
    """What the files below a folder take; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _text(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
