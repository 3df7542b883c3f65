"""Stage 1: self-supervised learning of the backbone (SimCLR, Chen et al. 2020, arXiv 2002.05709). Labels are not
touched."""

from __future__ import annotations

from typing import Any

import torch

from dbd_dist import augment, optim
from dbd_dist.config import SimCLRConfig
from dbd_dist.losses import nt_xent
from dbd_dist.models import ContrastiveModel
from dbd_dist.sampling import epoch_batches
from dbd_dist.stages.context import Context, EpochEnd, Meter


def pretrain(config: SimCLRConfig, model: ContrastiveModel, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place, from scratch or from the `resume` state of an earlier epoch."""
    world, images = context.world, context.images
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    done = 0
    if resume:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        done = resume["epoch"]
    network = world.data_parallel(model)
    network.train()
    mine = context.mine(config.batch)
    schedule = config.schedule_epochs or config.epochs

    for epoch in range(done + 1, config.epochs + 1):
        order = epoch_batches(len(images), config.batch, context.generator("simclr", epoch, "order"))
        draws = context.generator("simclr", epoch, "augment")
        meter = Meter("simclr", epoch, config.epochs, world, context.tick)
        batches = images.batches(order[:, mine])
        for step, pixels in enumerate(meter.steps(batches, len(order))):
            height, width = pixels.shape[2:]
            first, second = (
                augment.draw(config.augment, config.batch, height=height, width=width, generator=draws)[mine]
                for _ in range(2)
            )
            views = torch.cat(
                [augment.apply(config.augment, pixels, first), augment.apply(config.augment, pixels, second)]
            )
            with context.autocast():
                projections = network(views)
            z_first, z_second = projections.chunk(2)
            loss = nt_xent(z_first, z_second, config.temperature, world, symmetric=config.symmetric)
            optimizer.zero_grad()
            loss.backward()
            progress = (epoch - 1 + step / len(order)) / schedule
            lr = config.lr * optim.cosine(progress, config.warmup_epochs / schedule)
            optim.set_lr(optimizer, lr)
            optimizer.step()
            meter.add(config.batch, loss=loss)
        context.report(
            EpochEnd(
                stage="simclr",
                epoch=epoch,
                epochs=config.epochs,
                metrics=meter.metrics(lr=optimizer.param_groups[0]["lr"]),
                state=lambda epoch=epoch: {
                    "epoch": epoch,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                model=model,
            )
        )
