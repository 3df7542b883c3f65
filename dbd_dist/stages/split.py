"""The filter between stages 2 and 3: rank all samples by the loss of their given label; the best keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import keep_lowest, rank_slice
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.stage import Stage

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,)) -> the loss of each sample (B,)."""


@dataclass(frozen=True, kw_only=True)
class Split(Stage):
    """The filter: one global ranking of all samples by their SCE loss; the lowest keep their labels."""

    name: ClassVar[str] = "split"
    title: ClassVar[str] = "Split by loss"
    gives: ClassVar[tuple[str, ...]] = ("split_rule",)
    trains: ClassVar[bool] = False

    keep: float = 0.5
    """Fraction of the samples that keep their labels."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)
    """The one draw that losses are measured on."""
    batch: int = 512
    """Images a forward pass over all workers; no influence on the result."""

    def __post_init__(self):
        require(self, "split", keep="in (0, 1)", batch=">= 1")

    def offers(self) -> dict[str, Any]:
        return {"split_rule": self}


@torch.no_grad()
def measure_losses(config: Split, sample_loss: SampleLoss, model: Classifier, context: Context, epoch: int) -> Tensor:
    """The loss of every training sample, in eval mode on one augmented draw: float32 (N,) on the CPU, the same on
    all ranks."""
    world, images = context.world, context.images
    total = len(images)
    positions = torch.arange(total)[rank_slice(total, world.rank, world.size)]
    size = max(config.batch // world.size, 1)
    chunks = positions.split(size)
    labels = images.labels[positions.to(world.device)].split(size)
    draws = context.generator("split", epoch, "augment")
    params = None
    was_training = model.training
    model.eval()
    losses = []
    for chunk, given, pixels in zip(chunks, labels, images.batches(chunks)):
        if params is None:
            params = augment.draw(config.augment, total, height=pixels.shape[2], width=pixels.shape[3], generator=draws)
        with context.autocast():
            logits = model(augment.apply(config.augment, pixels, params[chunk]))
        losses.append(sample_loss(logits, given))
    model.train(was_training)
    return world.gather(torch.cat(losses)).cpu()


def split(losses_N: Tensor, config: Split) -> Tensor:
    """bool (N,): which samples keep their labels."""
    return keep_lowest(losses_N, config.keep)
