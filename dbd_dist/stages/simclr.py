"""Stage 1: self-supervised learning of the backbone (SimCLR, Chen et al. 2020, arXiv 2002.05709). Labels are not
touched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dbd_dist import optim
from dbd_dist.config import SimCLRConfig
from dbd_dist.data import augment
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.losses import nt_xent
from dbd_dist.models.heads import ContrastiveModel
from dbd_dist.stages.context import Context, EpochEnd, EpochLoop, Position

Network = Callable[[Tensor], Tensor]
LossOf = Callable[[Tensor, Tensor], Tensor]
"""(projections of the first views, of the second) -> the loss of the whole batch."""


def pretrain(config: SimCLRConfig, model: ContrastiveModel, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place, from scratch or from the `resume` state of an earlier epoch."""
    optimizer = make_optimizer(config, model)
    if resume:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    start = Position.of(resume)
    network = context.world.data_parallel(model)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    for epoch in range(start.epoch + 1, config.epochs + 1):
        meter = EpochLoop("simclr", epoch, config.epochs, context, state=state, start=start)
        train_epoch(config, model, network, optimizer, context, epoch, meter)
        context.report(
            EpochEnd(
                stage="simclr",
                epoch=epoch,
                epochs=config.epochs,
                metrics=meter.metrics(lr=optimizer.param_groups[0]["lr"]),
                state=lambda epoch=epoch: {**state(), "epoch": epoch},
                model=model,
            )
        )


def make_optimizer(config: SimCLRConfig, model: nn.Module) -> torch.optim.Optimizer:
    make = {"sgd": optim.sgd, "lars": optim.Lars}[config.optimizer]
    return make(model.parameters(), config.lr, config.momentum, config.weight_decay)


def train_epoch(
    config: SimCLRConfig,
    model: nn.Module,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Context,
    epoch: int,
    meter: EpochLoop,
) -> None:
    """One pass over the images; `network` is `model`, wrapped for data parallelism."""
    world, images = context.world, context.images
    mine = context.mine(config.batch) if config.chunk is None else context.mine_of_chunks(config.batch, config.chunk)
    parts = 1 if config.chunk is None else config.batch // config.chunk
    schedule = config.schedule_epochs or config.epochs
    order = epoch_batches(len(images), config.batch, context.generator("simclr", epoch, "order"))
    network.train()

    def loss_of(z_first: Tensor, z_second: Tensor) -> Tensor:
        return nt_xent(z_first, z_second, config.temperature, world, symmetric=config.symmetric)

    left = images.batches(order[meter.done :, mine])
    for step, pixels in enumerate(meter.steps(left, len(order)), start=meter.done):
        height, width = pixels.shape[2:]
        both = [
            augment.draw(config.augment, config.batch, height=height, width=width, generator=meter.draws)[mine]
            for _ in range(2)
        ]
        # in one call: on a GPU the launches of two cost more than the work
        views = augment.apply(config.augment, torch.cat([pixels, pixels]), augment.join(both))
        optimizer.zero_grad()
        if parts == 1:
            loss = backward(network, views, loss_of, context)
        else:
            loss = backward_in_chunks(model, network, views, parts, loss_of, context)
        progress = (epoch - 1 + step / len(order)) / schedule
        optim.set_lr(optimizer, config.lr * optim.cosine(progress, config.warmup_epochs / schedule))
        optimizer.step()
        meter.add(config.batch, loss=loss)


def backward(network: Network, views: Tensor, loss_of: LossOf, context: Context) -> Tensor:
    """Add the gradient of the whole batch's loss to that of the parameters; returns the loss.

    Args:
        views: (2B, 3, H, W), all first views, then all second.
    """
    with context.autocast():
        projections = network(views)
    loss = loss_of(*projections.chunk(2))
    loss.backward()
    return loss


def backward_in_chunks(
    model: nn.Module, network: nn.Module, views: Tensor, parts: int, loss_of: LossOf, context: Context
) -> Tensor:
    """As `backward`, with the activations of a `parts`-th of the batch in memory at a time (Gao et al. 2021, arXiv
    2101.06983): project all chunks without gradient, take the gradient of the whole batch's loss with respect to the
    projections, then project each chunk again and send its part of that gradient back.

    Exact but for batch norm, whose statistics are those of a chunk: both views of its images, on all ranks.
    """
    chunks = [torch.cat(pair) for pair in zip(*(view.chunk(parts) for view in views.chunk(2)))]
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad(), context.autocast():
        projections = [model(chunk) for chunk in chunks]
    for buffer, value in zip(model.buffers(), before):  # running statistics move once a step, in the second pass
        buffer.copy_(value)
    leaves = [z.requires_grad_() for z in projections]
    loss = loss_of(*(torch.cat([leaf.chunk(2)[view] for leaf in leaves]) for view in range(2)))
    loss.backward()
    for i, (chunk, leaf) in enumerate(zip(chunks, leaves), start=1):
        with nullcontext() if i == parts else context.world.no_sync(network):
            with context.autocast():
                again = network(chunk)
            again.backward(leaf.grad)
    return loss
