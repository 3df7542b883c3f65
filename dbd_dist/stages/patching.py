"""Patching of Neural Cleanse: the model unlearns the triggers that were found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.inversion import stamp
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes
from dbd_dist.stages.supervised import Supervised, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Patching(Stage):
    """Unlearning of Neural Cleanse (Wang et al., IEEE S&P 2019, sec. VI-B): fine-tuning on clean images, a fifth of
    which carry the trigger that was found and keep their true label. Without a found target the model stays as it is.

    The paper fine-tunes for one epoch on 10 % of the training data; epochs and learning rate are ours, for 5 %.
    """

    name: ClassVar[str] = "patching"
    title: ClassVar[str] = "Unlearning of found triggers"
    reads: ClassVar[tuple[str, ...]] = ("model", "flagged", "triggers")
    gives: ClassVar[tuple[str, ...]] = ("model",)
    evaluates: ClassVar[bool] = True
    on_clean: ClassVar[bool] = True

    epochs: int = 20
    batch: int = 32
    """Images a step over all workers."""
    lr: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    share: float = 0.2
    """Share of the images that carry a found trigger (paper: 0.2)."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, self.name, epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0")
        require(self, self.name, share="in [0, 1]")

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        plain = stages.get(Supervised.name)
        return cls(augment=plain.augment) if isinstance(plain, Supervised) else None

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        classes = inputs["flagged"]["classes"]
        if not len(classes):
            return {"model": inputs["model"]}
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        patch(self, model, inputs["triggers"][classes], context, resume)
        return {"model": model.state_dict()}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def patch(
    config: Patching, model: Classifier, triggers_A4HW: Tensor, context: Context, resume: dict[str, Any] | None
) -> None:
    """Fine-tune `model` in place."""
    world, clean = context.world, context.clean
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    restore(resume, model, optimizer)
    network = world.data_parallel(model)
    triggers, mine = triggers_A4HW.to(world.device), context.mine(config.batch)

    def one(epoch: int, loop: EpochLoop) -> None:
        drawn = context.generator(config.name, epoch, "order")
        order = epoch_batches(len(clean), config.batch, drawn)
        which = torch.randint(len(triggers), order.shape, generator=drawn)
        which[torch.rand(order.shape, generator=drawn) >= config.share] = -1  # no trigger
        chosen, which = order[loop.done :, mine], which[loop.done :, mine].to(world.device)
        here = chosen.to(world.device)
        network.train()
        for pixels, stamps, positions in zip(loop.steps(clean.batches(chosen), len(order)), which, here):
            params = augment.draw(
                config.augment, config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=loop.draws
            )
            views = augment.apply(config.augment, stamped_some(pixels, triggers, stamps), params[mine])
            with context.autocast():
                logits = network(views)
            loss = cross_entropy(logits, clean.labels[positions])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.add(config.batch, loss=loss)

    run_epochs(config, model, optimizer, context, resume, one)


def stamped_some(pixels_BCHW: Tensor, triggers_A4HW: Tensor, stamps_B: Tensor) -> Tensor:
    """uint8 images, each with the trigger of that index; -1: as it is."""
    every = stamp(pixels_BCHW.float() / 255, triggers_A4HW)
    one = every[stamps_B.clamp(min=0), torch.arange(len(stamps_B), device=stamps_B.device)]
    changed = (one * 255).round().to(torch.uint8)
    return torch.where((stamps_B >= 0).view(-1, 1, 1, 1), changed, pixels_BCHW)
