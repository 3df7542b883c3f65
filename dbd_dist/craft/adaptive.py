"""The adaptive attack's trigger: optimised so that poisoned images cluster in a self-supervised feature space (Huang et
al., ICLR 2022, arXiv 2202.03423, sec. 5.4)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.io.json import read_json
from dbd_dist import seeds
from dbd_dist.craft.config import AdaptiveConfig
from dbd_dist.craft.trigger import Trigger, fixed_mask, stamp, stamp_quantised
from dbd_dist.data.loaders import Images, open_images
from dbd_dist.data.sampling import cycling_batches, rank_slice
from dbd_dist.distributed.world import World
from dbd_dist.models.exported import Exported
from dbd_dist.runtime.checkpoint import load_state, save_state
from dbd_dist.runtime.run_folder import write_json

CHECKPOINT_STEPS = 50
EVIDENCE_IMAGES = 2000
FORWARD_BATCH = 500
RESIDENT_GIB = 16.0
STATE, TRIGGER, EVIDENCE = "state.pt", "trigger.npz", "evidence.json"


def distances(features_BD: Tensor, centres_KD: Tensor, distance: Literal["l2", "cosine"]) -> tuple[Tensor, Tensor]:
    """The two terms of the objective: the mean distance of features to their own centre, and the mean distance of that
    centre to the benign centres. The first minus the second is to be minimised."""
    centre = features_BD.mean(dim=0, keepdim=True)

    def apart(x: Tensor, y: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - F.cosine_similarity(x, y, dim=1)
        return torch.linalg.vector_norm(x - y, dim=1)

    return apart(features_BD, centre).mean(), apart(centres_KD, centre).mean()


def check(config: AdaptiveConfig, image_px: int, workers: int) -> None:
    """What can be refused before anything starts.

    Raises:
        UserError: the mask does not fit the images, or the batch the workers.
    """
    if config.optimise == "pattern":
        fixed_mask(config, image_px)
    if config.batch % workers or config.batch // workers < 1:
        raise UserError(
            f"a batch of {config.batch} cannot be shared equally by {workers} workers",
            where="craft.batch",
            expected=f"a multiple of {workers}",
        )


def craft(
    config: AdaptiveConfig,
    exported: Exported,
    dataset: Dataset,
    world: World,
    folder: Path,
    tick: Callable[[str, int, int, int, int], None] = lambda *_: None,
    note: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:
    """Optimise the trigger, and leave it with its evidence as files; goes on from the newest checkpoint.

    Raises:
        UserError: see `check`; the objective or its gradient is not finite; on every rank.
    """
    check(config, exported.image_px, world.size)
    if world.broadcast((folder / TRIGGER).exists()):
        return
    images = open_images(dataset, world.device, resident_gib=RESIDENT_GIB)
    backbone = exported.build(world.device)
    features = _Features(backbone, exported, scaled=config.normalise_features)
    centres = benign_centres(features, images, dataset.manifest.num_classes, world)
    trigger = Trigger(config, exported.image_px).to(world.device)
    first = trigger.quantised()

    others = torch.nonzero(images.labels.cpu() != config.target).flatten()
    order = cycling_batches(others, config.steps, config.batch, seeds.generator(config.seed, "adaptive", "order"))
    optimise(config, trigger, features, centres, images, order, world, folder, tick, note)

    drawn = torch.randperm(len(others), generator=seeds.generator(config.seed, "adaptive", "evidence"))
    fixed = others[drawn[:EVIDENCE_IMAGES]].sort().values
    last = trigger.quantised()
    evidence = {
        "images": len(fixed),
        "distance": config.distance,
        "before": measure(first, fixed, features, centres, images, config, world),
        "after": measure(last, fixed, features, centres, images, config, world),
        "mask_mean": float(last[1].float().mean()) / 255,
    }
    if world.is_main:
        write_json(folder / EVIDENCE, evidence)
        aside = folder / f".{TRIGGER}"
        with open(aside, "wb") as file:
            np.savez(file, pattern=last[0].permute(1, 2, 0).cpu().numpy(), mask=last[1].cpu().numpy())
        os.replace(aside, folder / TRIGGER)
    world.barrier()


def collect(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The artefact's arrays and evidence."""
    try:
        arrays = {n: np.ascontiguousarray(a) for n, a in map_arrays(folder / TRIGGER, ("pattern", "mask")).items()}
        return arrays, read_json(folder / EVIDENCE)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=folder, hint="delete this folder and run again") from error


def optimise(
    config: AdaptiveConfig,
    trigger: Trigger,
    features: Callable[[Tensor], Tensor],
    centres_KD: Tensor,
    images: Images,
    order: Tensor,
    world: World,
    folder: Path,
    tick: Callable[[str, int, int, int, int], None],
    note: Callable[[dict[str, Any]], None],
) -> None:
    """Adam on the trigger's logits, in place. Every rank takes its part of each batch.

    Args:
        order: int64 (steps, batch), positions of the images of each step.
    """
    parameters = list(trigger.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    done = _resume(folder / STATE, trigger, optimizer, world)
    mine = rank_slice(config.batch, world.rank, world.size)
    failed = torch.zeros((), dtype=torch.int64, device=world.device)
    remaining = enumerate(images.batches(order[done:, mine]), start=done + 1)
    for step, pixels in remaining:
        poisoned = features(stamp(pixels.float(), *trigger()))
        # every rank scores the whole batch, so that the mean over ranks is the whole batch's gradient
        spread, separation = distances(world.gather_with_grad(poisoned), centres_KD, config.distance)
        objective = spread - separation
        optimizer.zero_grad()
        objective.backward()
        finite = objective.detach().isfinite()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = world.mean(parameter.grad)
            finite = finite & parameter.grad.isfinite().all()
        failed = torch.where((failed == 0) & ~finite, step, failed)
        optimizer.step()
        tick("optimise", 1, 1, step, config.steps)
        if step % CHECKPOINT_STEPS == 0 or step == config.steps:
            if failed:
                raise UserError(
                    "the objective or its gradient is not finite",
                    where=f"adaptive, step {int(failed)}",
                    hint="use a smaller --lr, or another --backbone",
                )
            if world.is_main:
                note({"loss": float(objective.detach())})
                state = {"step": step, "trigger": trigger.state_dict(), "optimizer": optimizer.state_dict()}
                save_state(state, folder / STATE)


def _resume(path: Path, trigger: Trigger, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Load the newest checkpoint; the number of steps that it holds."""
    if not world.broadcast(path.exists()):
        return 0
    state = load_state(path, needs=("step", "trigger", "optimizer"))
    world.barrier()  # rank 0 replaces the file once it goes on
    trigger.load_state_dict(state["trigger"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class _Features:
    """Pooled features of float images in grey levels: (B, 3, H, W) -> (B, D)."""

    def __init__(self, backbone: nn.Module, exported: Exported, *, scaled: bool):
        self._backbone, self._exported, self._scaled = backbone, exported, scaled

    def __call__(self, grey_BCHW: Tensor) -> Tensor:
        features = self._backbone(self._exported.inputs(grey_BCHW)).float()
        return F.normalize(features, dim=1) if self._scaled else features


@torch.no_grad()
def benign_centres(features: Callable[[Tensor], Tensor], images: Images, num_classes: int, world: World) -> Tensor:
    """The mean feature of each class over all training images as they are: (K, D). Classes without images are left
    out."""
    positions = torch.arange(len(images))[rank_slice(len(images), world.rank, world.size)]
    chunks = list(positions.split(FORWARD_BATCH))
    sums: Tensor | None = None
    for index, pixels in zip(chunks, images.batches(chunks), strict=True):
        found = features(pixels.float()).double()
        if sums is None:
            sums = found.new_zeros(num_classes, found.shape[1] + 1)
        counted = torch.cat([found, found.new_ones(len(found), 1)], dim=1)
        sums.index_add_(0, images.labels[index.to(images.labels.device)], counted)
    assert sums is not None
    sums = world.sum(sums)
    there = sums[:, -1] > 0
    return (sums[there, :-1] / sums[there, -1:]).float()


@torch.no_grad()
def measure(
    trigger: tuple[Tensor, Tensor],
    positions: Tensor,
    features: Callable[[Tensor], Tensor],
    centres_KD: Tensor,
    images: Images,
    config: AdaptiveConfig,
    world: World,
) -> dict[str, float]:
    """The objective and its two terms, of a quantised trigger on the images at `positions`."""
    chunks = list(positions[rank_slice(len(positions), world.rank, world.size)].split(FORWARD_BATCH))
    parts = [features(stamp_quantised(pixels, *trigger).float()) for pixels in images.batches(chunks)]
    mine = torch.cat(parts) if parts else centres_KD.new_empty(0, centres_KD.shape[1])
    spread, separation = distances(world.gather(mine), centres_KD, config.distance)
    return {
        "objective": float(spread - separation),
        "distance_to_own_centre": float(spread),
        "distance_to_benign_centres": float(separation),
    }
