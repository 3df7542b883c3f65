"""Isolation of Anti-Backdoor Learning: poisoned samples are learnt first, and fastest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from dbd_dist.data.sampling import keep_lowest
from dbd_dist.fields import require
from dbd_dist.stages.context import Context
from dbd_dist.stages.flagged import flag
from dbd_dist.stages.retrain import settings_of
from dbd_dist.stages.split import Split, measure_losses
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes
from dbd_dist.stages.supervised import Supervised, train


@dataclass(frozen=True, kw_only=True)
class Isolation(Supervised):
    """First part of Anti-Backdoor Learning (Li et al., NeurIPS 2021, arXiv 2110.11571, eq. 3): a few epochs that hold
    the loss of ordinary samples at gamma; those with the lowest loss are then isolated.

    The paper's settings for CIFAR-10: 20 of 100 epochs, learning rate 0.1, gamma 0.5, 1 % isolated. Presets have a
    fifth of the epochs of plain training, at most 20, and its batch and augmentation.
    """

    name: ClassVar[str] = "isolation"
    title: ClassVar[str] = "Isolation by local gradient ascent"
    gives: ClassVar[tuple[str, ...]] = ("model", "flagged")

    epochs: int = 20
    batch: int = 64
    """Images a step over all workers."""
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = ()
    """Epochs after which the step schedule divides the learning rate by ten."""
    gamma: float = 0.5
    """Loss of a sample below which it is raised instead of lowered."""
    share: float = 0.01
    """Share of the training samples that is isolated."""

    def __post_init__(self):
        super().__post_init__()
        require(self, self.name, gamma=">= 0", share="in (0, 1)")

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        plain = stages.get(Supervised.name)
        if not isinstance(plain, Supervised):
            return None
        paper = cls(**settings_of(plain) | {"schedule": "step", "milestones": ()})
        return replace(paper, epochs=fraction_of(plain.epochs, 0.2, at_most=20), weight_decay=1e-4)

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.prepare(context.classifier(self.name, "weights"))
        train(self, model, context, resume, batch_loss=partial(local_gradient_ascent, self.gamma))
        how = Split(augment=context.normalise, batch=512)
        losses = measure_losses(how, _sample_losses, model, context, self.epochs)
        flagged = flag(samples=keep_lowest(losses, self.share), scores=-losses)
        return {"model": model.state_dict(), "flagged": flagged}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier + networks.split)


def fraction_of(epochs: int, fraction: float, *, at_most: int) -> int:
    """The paper's share of an epoch budget."""
    return min(max(round(fraction * epochs), 1), at_most)


def local_gradient_ascent(gamma: float, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The mean of ``sign(loss - gamma) * loss`` over samples (eq. 3)."""
    losses_B = _sample_losses(logits_BK, labels_B)
    return ((losses_B.detach() - gamma).sign() * losses_B).mean()


def _sample_losses(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_BK.float(), labels_B, reduction="none")
