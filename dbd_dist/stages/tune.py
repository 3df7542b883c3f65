"""The head of the warm-up, trained on with the samples that the split keeps (an ablation of DBD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.fields import require
from dbd_dist.stages.context import Context
from dbd_dist.stages.mixmatch import renew
from dbd_dist.stages.split import Split
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes, check_batch, find_stage
from dbd_dist.stages.warmup import Warmup, fit_head


@dataclass(frozen=True, kw_only=True)
class TuneHead(Stage):
    """The head goes on with the labels of the high-credible samples alone; the backbone stays frozen.

    The article names no settings of this ablation: loss and settings are the warm-up's.
    """

    name: ClassVar[str] = "tune"
    title: ClassVar[str] = "Head tuning on kept labels"
    reads: ClassVar[tuple[str, ...]] = ("model", "sample_loss", "split_rule")
    gives: ClassVar[tuple[str, ...]] = ("model", "split")
    evaluates: ClassVar[bool] = True

    epochs: int = 10
    batch: int = 128
    """Images a step over all workers."""
    lr: float = 0.002
    """Learning rate of Adam, which starts anew."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, self.name, epochs=">= 1", batch=">= 2", lr="> 0")

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        warmup = find_stage(tuple(stages.values()), Warmup)
        if warmup is None:
            return None
        return cls(epochs=warmup.epochs, batch=warmup.batch, lr=warmup.lr, augment=warmup.augment)

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        loss = inputs["sample_loss"]
        split: dict[str, Tensor] = (
            resume["split"] if resume else renew({}, inputs["split_rule"], loss, model, context, 1)
        )
        fit_head(
            self, model, context, resume,
            sample_loss=loss, among=split["kept"].nonzero().flatten(), more=lambda: {"split": split},
        )  # fmt: skip
        return {"model": model.state_dict(), "split": split}

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        self.check_image_px(image_px)
        split = find_stage(others, Split)
        least, _ = (0.5, 0.5) if split is None else split.bounds()
        check_batch(self.name, self.batch, workers, round(least * images), "samples that the split keeps")

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        tuned = networks.classifier + 2 * networks.head + networks.split
        return StageBytes(checkpoint=tuned, kept=tuned)
