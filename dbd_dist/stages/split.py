"""The filter between stages 2 and 3: rank all samples by the loss of their given label; the best keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from dbd_dist.config import SplitConfig, WarmupConfig
from dbd_dist.data import augment
from dbd_dist.data.sampling import keep_lowest, rank_slice
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.warmup import sample_losses


@torch.no_grad()
def measure_losses(
    config: SplitConfig, warmup: WarmupConfig, model: Classifier, context: Context, epoch: int
) -> Tensor:
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
        losses.append(sample_losses(warmup, logits, given))
    model.train(was_training)
    return world.gather(torch.cat(losses)).cpu()


def split(losses_N: Tensor, config: SplitConfig) -> Tensor:
    """bool (N,): which samples keep their labels."""
    return keep_lowest(losses_N, config.keep)
