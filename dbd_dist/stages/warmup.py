"""Stage 2: a linear head on the frozen backbone, trained on all given labels with symmetric cross-entropy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist import optim
from dbd_dist.config import WarmupConfig
from dbd_dist.data import augment
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.losses import symmetric_cross_entropy
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context, EpochEnd, EpochLoop, Position


def sample_losses(config: WarmupConfig, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of each sample (B,): what the head is trained with, and what the split ranks by."""
    if config.loss == "ce":
        return F.cross_entropy(logits_BK.float(), labels_B, reduction="none")
    return symmetric_cross_entropy(logits_BK, labels_B, config.sce_alpha, config.sce_beta)


def train_head(
    config: WarmupConfig, model: Classifier, context: Context, resume: dict[str, Any] | None
) -> torch.optim.Optimizer:
    """Train the head of `model` in place; its backbone does not change.

    Returns:
        The optimiser. It holds all parameters, so that MixMatch can go on with it; those of the backbone have no
        state yet.
    """
    world, images = context.world, context.images
    optimizer = optim.adam(model.parameters(), config.lr)
    if resume:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    start = Position.of(resume)
    model.backbone.requires_grad_(False)
    head = world.data_parallel(model.head)
    head.train()
    model.backbone.train(not config.freeze_batch_norm)
    mine = context.mine(config.batch)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    for epoch in range(start.epoch + 1, config.epochs + 1):
        order = epoch_batches(len(images), config.batch, context.generator("warmup", epoch, "order"))
        meter = EpochLoop("warmup", epoch, config.epochs, context, state=state, start=start)
        chosen = order[meter.done :, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        # the meter first: `zip` looks into what comes first once more, and so ends its last step
        for pixels, positions in zip(meter.steps(images.batches(chosen), len(order)), here):
            params = augment.draw(
                config.augment, config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=meter.draws
            )
            labels = images.labels[positions]
            with context.autocast():
                with torch.no_grad():
                    features = model.backbone(augment.apply(config.augment, pixels, params[mine]))
                logits = head(features)
            loss = sample_losses(config, logits, labels).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.add(config.batch, loss=loss)
        context.report(
            EpochEnd(
                stage="warmup",
                epoch=epoch,
                epochs=config.epochs,
                metrics=meter.metrics(lr=config.lr),
                state=lambda epoch=epoch: {**state(), "epoch": epoch},
                model=model,
            )
        )
    model.backbone.requires_grad_(True)
    return optimizer
