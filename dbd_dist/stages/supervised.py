"""No defence: plain supervised training on the given labels, the baseline that a backdoor gets into."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from dbd_dist import optim
from dbd_dist.config import SupervisedConfig
from dbd_dist.data import augment
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context, EpochEnd, EpochLoop, Position


def train(config: SupervisedConfig, model: Classifier, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place."""
    world, images = context.world, context.images
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    if resume:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
    start = Position.of(resume)
    network = world.data_parallel(model)
    mine = context.mine(config.batch)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    for epoch in range(start.epoch + 1, config.epochs + 1):
        order = epoch_batches(len(images), config.batch, context.generator("supervised", epoch, "order"))
        meter = EpochLoop("supervised", epoch, config.epochs, context, state=state, start=start)
        chosen = order[:, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        network.train()
        left = images.batches(chosen[meter.done :])
        for step, pixels in enumerate(meter.steps(left, len(order)), start=meter.done):
            params = augment.draw(
                config.augment, config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=meter.draws
            )
            views = augment.apply(config.augment, pixels, params[mine])
            with context.autocast():
                logits = network(views)
            loss = F.cross_entropy(logits.float(), images.labels[here[step]])
            optimizer.zero_grad()
            loss.backward()
            if config.schedule == "cosine":
                factor = optim.cosine((epoch - 1 + step / len(order)) / config.epochs)
            else:
                factor = optim.steps_down(epoch - 1, config.milestones)
            optim.set_lr(optimizer, config.lr * factor)
            optimizer.step()
            meter.add(config.batch, loss=loss)
        context.report(
            EpochEnd(
                stage="supervised",
                epoch=epoch,
                epochs=config.epochs,
                metrics=meter.metrics(lr=optimizer.param_groups[0]["lr"]),
                state=lambda epoch=epoch: {**state(), "epoch": epoch},
                model=model,
            )
        )
