"""The label-consistent attack's images: chosen, perturbed batch by batch, kept batch by batch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.plan import choose_poisoned
from dbd_dist.craft.config import LabelConsistentConfig
from dbd_dist.craft.pgd import perturb, random_starts
from dbd_dist.data.loaders import StreamedImages
from dbd_dist.distributed.world import World
from dbd_dist.models.exported import Exported


def chosen(config: LabelConsistentConfig, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The images that will be poisoned, as `dbd prepare` draws them: int64 (m,), in order.

    Raises:
        UserError: the target is not a class, or has fewer images than are asked for.
    """
    poisoned = choose_poisoned(
        labels,
        rate=config.rate,
        target=config.target,
        num_classes=num_classes,
        seed=config.seed,
        eligible=labels == config.target,
    )
    return np.flatnonzero(poisoned)


def craft(
    config: LabelConsistentConfig,
    exported: Exported,
    dataset: Dataset,
    world: World,
    folder: Path,
    tick: Callable[[str, int, int, int, int], None] = lambda *_: None,
) -> None:
    """Perturb all chosen images, each batch on one rank, and leave each batch as a file; those that are there stand.

    Raises:
        UserError: a loss or gradient is not finite; on every rank.
    """
    images = StreamedImages.open(dataset, world.device)
    positions = torch.from_numpy(chosen(config, images.labels.cpu().numpy(), dataset.manifest.num_classes))
    batches = list(enumerate(positions.split(config.batch)))
    mine = [
        (number, index) for number, index in batches[world.rank :: world.size] if not _file(folder, number).exists()
    ]
    model = exported.build(world.device)

    failed = torch.zeros((), dtype=torch.int64, device=world.device)
    for (number, index), pixels in zip(mine, images.batches([index for _, index in mine]), strict=True):
        starts = random_starts(
            index.tolist(), exported.image_px, norm=config.norm, eps=config.eps, seed=config.seed
        ).to(world.device, memory_format=torch.channels_last)
        labels = torch.full((len(index),), config.target, device=world.device)
        perturbed, failed = perturb(
            lambda grey: model(exported.inputs(grey)),
            pixels,
            labels,
            starts,
            norm=config.norm,
            eps=config.eps,
            step=config.step,
            steps=config.steps,
            tick=lambda step, number=number: tick("perturb", number + 1, len(batches), step, config.steps),
        )
        if failed:
            break
        _keep(_file(folder, number), pixels, perturbed, _right(model, exported, pixels, labels),
              _right(model, exported, perturbed, labels))  # fmt: skip
    steps = [step for step in world.gather(failed.view(1)).tolist() if step]  # also waits for every rank
    if steps:
        raise UserError(
            "the surrogate's loss or its gradient is not finite",
            where=f"label-consistent, step {min(steps)}",
            hint="use a smaller --step, or another --surrogate",
        )


def collect(config: LabelConsistentConfig, index: np.ndarray, folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The artefact's arrays and evidence, from the files of all batches.

    Args:
        index: as `chosen` gives it.

    Raises:
        UserError: a file is damaged.
    """
    parts = [_read(_file(folder, number)) for number in range(math.ceil(len(index) / config.batch))]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert len(whole["images"]) == len(index)
    evidence = {
        "images": len(index),
        "surrogate_accuracy_before": float(whole["right_before"].mean()),
        "surrogate_accuracy_after": float(whole["right_after"].mean()),
        "mean_linf": float(whole["linf"].mean()),
        "mean_l2": float(whole["l2"].mean()),
    }
    return {"index": index, "images": whole["images"]}, evidence


@torch.no_grad()
def _right(model: nn.Module, exported: Exported, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    return model(exported.inputs(images_BCHW.float())).argmax(dim=1) == labels_B


def _file(folder: Path, number: int) -> Path:
    return folder / f"batch_{number:06d}.npz"


def _keep(path: Path, pixels: Tensor, perturbed: Tensor, before: Tensor, after: Tensor) -> None:
    delta = (perturbed.float() - pixels.float()).flatten(1)
    values = {
        "images": perturbed.permute(0, 2, 3, 1),
        "right_before": before,
        "right_after": after,
        "linf": delta.abs().amax(dim=1),
        "l2": delta.norm(dim=1),
    }
    aside = path.with_name(f".{path.name}")
    with open(aside, "wb") as file:
        np.savez(file, **{name: value.cpu().numpy() for name, value in values.items()})
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(map_arrays(path, ("images", "right_before", "right_after", "linf", "l2")))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=path, hint="delete this file and run again") from error
