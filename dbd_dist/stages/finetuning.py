"""Fine-tuning of Anti-Backdoor Learning: the model learns on without the isolated samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.isolation import fraction_of
from dbd_dist.stages.retrain import Retrain
from dbd_dist.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Finetuning(Retrain):
    """Second part of Anti-Backdoor Learning: the isolated samples are left out, the model goes on from where it is.

    The authors' code: 60 epochs, learning rate 0.1, a tenth after 40. Presets have three fifths of the epochs of plain
    training, at most 60, and its schedule, batch and augmentation.
    """

    name: ClassVar[str] = "finetuning"
    title: ClassVar[str] = "Training without isolated samples"
    reads: ClassVar[tuple[str, ...]] = ("model", "flagged")

    epochs: int = 60
    batch: int = 64
    """Images a step over all workers."""
    weight_decay: float = 1e-4
    milestones: tuple[int, ...] = (40,)
    """Epochs after which the step schedule divides the learning rate by ten."""

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        plain = super().from_preset(stages)
        if not isinstance(plain, cls):
            return None
        epochs = fraction_of(plain.epochs, 0.6, at_most=60)
        return replace(plain, epochs=epochs, milestones=(max(2 * epochs // 3, 1),), weight_decay=1e-4)

    def first(self, context: Context, inputs: Mapping[str, Any]) -> Classifier:
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        return model
