"""No defence: plain supervised training on the given labels, the baseline that a backdoor gets into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes


@dataclass(frozen=True, kw_only=True)
class Supervised(Stage):
    """No defence: plain training on the given labels (the baseline of DBD's tables)."""

    name: ClassVar[str] = "supervised"
    title: ClassVar[str] = "Plain supervised training"
    gives: ClassVar[tuple[str, ...]] = ("model",)
    evaluates: ClassVar[bool] = True
    kept_when_last: ClassVar[bool] = True

    epochs: int = 200
    batch: int = 128
    """Images a step over all workers."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    """step: times 0.1 at the milestones. cosine: to zero over all epochs."""
    milestones: tuple[int, ...] = (100, 150)
    """Epochs after which the step schedule divides the learning rate by ten."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, self.name, epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0"
        )  # fmt: skip
        if any(m < 1 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"milestones are {self.milestones}",
                where=f"{self.name}.milestones",
                expected="whole numbers from 1, each larger than the one before",
            )

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.prepare(context.classifier("supervised", "weights"))
        train(self, model, context, resume)
        return {"model": model.state_dict()}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The mean loss of a batch."""
    return F.cross_entropy(logits_BK.float(), labels_B)


def train(
    config: Supervised,
    model: Classifier,
    context: Context,
    resume: dict[str, Any] | None,
    *,
    positions: Tensor | None = None,
    batch_loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> None:
    """Train `model` in place.

    Args:
        positions: int64 (n,), the samples to train on; default all.
        batch_loss: (logits (B, K), labels (B,)) -> the mean loss of this rank's part of a batch.
    """
    world, images = context.world, context.images
    count = len(images) if positions is None else len(positions)
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    restore(resume, model, optimizer)
    network = world.data_parallel(model)
    mine = context.mine(config.batch)

    def one(epoch: int, loop: EpochLoop) -> None:
        order = epoch_batches(count, config.batch, context.generator(config.name, epoch, "order"))
        if positions is not None:
            order = positions[order]
        chosen = order[:, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        network.train()
        left = images.batches(chosen[loop.done :])
        for step, pixels in enumerate(loop.steps(left, len(order)), start=loop.done):
            params = augment.draw(
                config.augment, config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=loop.draws
            )
            views = augment.apply(config.augment, pixels, params[mine])
            with context.autocast():
                logits = network(views)
            loss = batch_loss(logits, images.labels[here[step]])
            optimizer.zero_grad()
            loss.backward()
            if config.schedule == "cosine":
                factor = optim.cosine((epoch - 1 + step / len(order)) / config.epochs)
            else:
                factor = optim.steps_down(epoch - 1, config.milestones)
            optim.set_lr(optimizer, config.lr * factor)
            optimizer.step()
            loop.add(config.batch, loss=loss)

    run_epochs(config, model, optimizer, context, resume, one)
