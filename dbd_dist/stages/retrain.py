"""Training again, without the samples that a detector flagged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from data_prep.errors import UserError
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.flagged import unflagged
from dbd_dist.stages.stage import Stage
from dbd_dist.stages.supervised import Supervised, train


@dataclass(frozen=True, kw_only=True)
class Retrain(Supervised):
    """Plain training from new weights on the samples that were not flagged; a preset's settings of plain training."""

    name: ClassVar[str] = "retrain"
    title: ClassVar[str] = "Training without flagged samples"
    reads: ClassVar[tuple[str, ...]] = ("flagged",)

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        plain = stages.get(Supervised.name)
        return cls(**settings_of(plain)) if isinstance(plain, Supervised) else None

    def first(self, context: Context, inputs: Mapping[str, Any]) -> Classifier:
        """The model to start from."""
        return context.classifier(self.name, "weights")

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.prepare(self.first(context, inputs))
        positions = unflagged(inputs["flagged"])
        if len(positions) < self.batch:
            raise UserError(
                f"{len(positions)} of {len(context.images)} samples are left after detection, fewer than a batch",
                where=f"{self.name}.batch",
                expected=f"at least {self.batch} samples",
                hint="let the detector flag fewer, or use a smaller batch",
            )
        train(self, model, context, resume, positions=positions)
        return {"model": model.state_dict()}


def settings_of(plain: Supervised) -> dict[str, Any]:
    """The fields of plain training, for a stage that has them too."""
    return {f.name: getattr(plain, f.name) for f in dataclasses.fields(Supervised)}
