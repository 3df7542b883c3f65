"""What detectors of poisoned samples share: they look at the features of a trained model, class by class."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dbd_dist.data import augment
from dbd_dist.data.sampling import rank_slice
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context, EpochEnd
from dbd_dist.stages.flagged import Flagged, flag
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes


class Examined(NamedTuple):
    """What a detector makes of one class."""

    samples: Tensor
    """bool (n,): which are taken to be poisoned."""
    scores: Tensor | None = None
    """float (n,): how suspect each sample is."""
    score: float | None = None
    """How suspect the class is."""
    is_target: bool | None = None
    """Whether the class is taken to be an attacker's target; None where the detector does not say."""


@dataclass(frozen=True, kw_only=True)
class Detector(Stage):
    """Flags training samples by the penultimate features of the model trained before."""

    reads: ClassVar[tuple[str, ...]] = ("model",)
    gives: ClassVar[tuple[str, ...]] = ("flagged",)

    batch: int = 512
    """Images a forward pass over all workers; no influence on the result."""

    def __post_init__(self):
        require(self, self.name, batch=">= 1")

    def check(self, images: int, image_px: int, workers: int, others: Any) -> None:
        """Any batch does: the last one is shorter."""

    def examine(self, features_nD: Tensor, seed: int) -> Examined:
        """Judge the samples that were given one class; rank 0 alone calls it.

        Args:
            features_nD: float32 (n, D) on the CPU, n >= 1.
            seed: of random choices.
        """
        raise NotImplementedError(f"{type(self).__name__}.examine")

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        if resume:
            return {"flagged": resume["flagged"]}
        start = time.perf_counter()
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model.to(context.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        flagged = context.world.broadcast(self._examine_all(model, context))
        time_s = time.perf_counter() - start
        context.report(
            EpochEnd(
                stage=self.name,
                epoch=1,
                epochs=1,
                metrics={
                    "flagged": float(flagged["samples"].sum()),
                    "images_per_s": len(context.images) / time_s,
                    "time_s": time_s,
                },
                state=lambda: {"epoch": 1, "flagged": flagged},
                model=model,
            )
        )
        return {"flagged": flagged}

    def _examine_all(self, model: Classifier, context: Context) -> Flagged | None:
        """On rank 0; None on the others, which only compute features."""
        count, classes = len(context.images), context.num_classes
        samples, scores = torch.zeros(count, dtype=torch.bool), torch.zeros(count)
        class_scores, targets = torch.zeros(classes), []
        one = Examined(samples)
        for label, positions, features in class_features(model, context, self.batch):
            if context.world.is_main:
                seed = int(torch.randint(2**31 - 1, (), generator=context.generator(self.name, label)))
                one = self.examine(features, seed)
                samples[positions] = one.samples
                scores[positions] = 0.0 if one.scores is None else one.scores.float()
                class_scores[label] = one.score or 0.0
                targets += [label] if one.is_target else []
            context.tick(self.name, 1, 1, label + 1, classes)
        if not context.world.is_main:
            return None
        return flag(
            samples=samples,
            scores=None if one.scores is None else scores,
            classes=None if one.is_target is None else torch.tensor(targets, dtype=torch.int64),
            class_scores=None if one.score is None else class_scores,
        )

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=networks.split, kept=networks.split)


@torch.no_grad()
def class_features(model: Classifier, context: Context, batch: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Penultimate features of the images that were given each class, not augmented, in eval mode; shared out over the
    ranks. One class is in memory at a time.

    Args:
        batch: images a forward pass over all workers.

    Yields:
        A class, the positions int64 (n,) of its samples, and their features float32 (n, D); on the CPU, the same on
        all ranks. Classes without samples are left out.
    """
    world, images = context.world, context.images
    labels = images.labels.cpu()
    model.eval()
    for label in range(context.num_classes):
        positions = torch.nonzero(labels == label).flatten()
        if not len(positions):
            continue
        mine = positions[rank_slice(len(positions), world.rank, world.size)]
        parts = [torch.empty(0, model.head.in_features, device=world.device)]
        for pixels in images.batches(mine.split(max(batch // world.size, 1)) if len(mine) else ()):
            with context.autocast():
                parts.append(model.backbone(augment.normalise(context.normalise, pixels)).float())
        yield label, positions, world.gather(torch.cat(parts)).cpu()
