"""Unlearning of Anti-Backdoor Learning: gradient ascent on the isolated samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import cycling_batches
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.flagged import Flagged, unflagged
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes
from dbd_dist.stages.supervised import Supervised, cross_entropy


@dataclass(frozen=True, kw_only=True)
class Unlearning(Stage):
    """Last part of Anti-Backdoor Learning (Li et al., NeurIPS 2021, arXiv 2110.11571, eq. 4): the loss of the other
    samples is lowered and that of the isolated ones raised, with fixed batch-norm statistics.

    The authors' code makes 5 epochs of 8 steps on CIFAR-10, each a pass over the 500 isolated samples, at learning rate
    5e-4, and raises the loss of these alone. That loss has no bound, and with some seeds it diverges within these
    steps: here a sample whose loss has come to `bound` is let be.
    """

    name: ClassVar[str] = "unlearning"
    title: ClassVar[str] = "Unlearning by gradient ascent"
    reads: ClassVar[tuple[str, ...]] = ("model", "flagged")
    gives: ClassVar[tuple[str, ...]] = ("model",)
    evaluates: ClassVar[bool] = True

    epochs: int = 5
    steps: int = 8
    """Steps an epoch."""
    batch: int = 64
    """Images a step over all workers, of the isolated samples and as many of the others."""
    lr: float = 5e-4
    """Learning rate of SGD."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    bound: float = 20.0
    """A loss that is raised no further: a probability of 2e-9 of the given label (ours)."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, self.name, epochs=">= 1", steps=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)")
        require(self, self.name, weight_decay=">= 0", bound="> 0")

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        plain = stages.get(Supervised.name)
        return cls(augment=plain.augment) if isinstance(plain, Supervised) else None

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        unlearn(self, model, inputs["flagged"], context, resume)
        return {"model": model.state_dict()}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def unlearn(
    config: Unlearning, model: Classifier, flagged: Flagged, context: Context, resume: dict[str, Any] | None
) -> None:
    """Train `model` in place."""
    world, images = context.world, context.images
    assert flagged["samples"] is not None
    isolated, others = torch.nonzero(flagged["samples"]).flatten(), unflagged(flagged)
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    restore(resume, model, optimizer)
    network = world.data_parallel(model)
    mine = context.mine(config.batch)
    both = torch.cat([torch.arange(config.batch)[mine], torch.arange(config.batch, 2 * config.batch)[mine]])

    def one(epoch: int, loop: EpochLoop) -> None:
        order = context.generator(config.name, epoch, "order")
        drawn = [cycling_batches(kind, config.steps, config.batch, order) for kind in (others, isolated)]
        chosen = torch.cat(drawn, dim=1)[loop.done :, both]
        here = chosen.to(world.device)
        network.eval()  # half of a batch is poisoned, if isolation is right: its statistics would be of no use
        for pixels, positions in zip(loop.steps(images.batches(chosen), config.steps), here):
            params = augment.draw(
                config.augment, 2 * config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=loop.draws
            )
            with context.autocast():
                logits = network(augment.apply(config.augment, pixels, params[both]))
            labels, half = images.labels[positions], len(positions) // 2
            loss_others = cross_entropy(logits[:half], labels[:half])
            raised = F.cross_entropy(logits[half:].float(), labels[half:], reduction="none")
            loss_isolated = raised.clamp(max=config.bound).mean()
            loss = loss_others - loss_isolated
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.add(2 * config.batch, loss=loss, loss_others=loss_others, loss_isolated=loss_isolated)

    run_epochs(config, model, optimizer, context, resume, one)
