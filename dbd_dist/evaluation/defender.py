"""What a defender can measure of a model and a split who does not know which labels are true.

Nothing here sees the truth: it is made of training images, given labels, and what the split did with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.loaders import Images
from dbd_dist.data.split_rules import neighbour_votes
from dbd_dist.models.heads import Classifier
from dbd_dist.runtime.watchdog import beat
from dbd_dist.stages.mixmatch import withheld

SAMPLES = 4000
FORWARD_BATCH = 500
NEIGHBOURS = 10
METRICS = {
    "withheld_agreement": "share of withheld labels, of images that the split keeps, that the model predicts",
    "split_stability": "overlap of the kept images with those of the split before (Jaccard index)",
    "loss_gap": "mean cross-entropy of the images that were dropped minus that of the kept, in standard deviations",
    "knn_agreement": f"share of kept images whose label most of the {NEIGHBOURS} nearest kept ones have",
}
"""Higher is better, for all of them."""


class Defender:
    """Measures a fixed sample of the training images; rank 0 alone calls it.

    Args:
        withhold: share of the samples whose labels fine-tuning does not see, see `MixMatch.withhold`.
    """

    def __init__(
        self, images: Images, device: torch.device, normalise: AugmentConfig, *, seed: int, withhold: float, bf16: bool
    ):
        self._images, self._device, self._normalise, self._bf16 = images, device, normalise, bf16
        count = len(images)
        drawn = torch.randperm(count, generator=seeds.generator(seed, "defender"))[:SAMPLES]
        self._positions = drawn.sort().values
        self._withheld = withheld(withhold, count, seeds.generator(seed, "mixmatch", "withheld"))[self._positions]
        self._before: Tensor | None = None

    def note(self, kept_N: Tensor) -> float | None:
        """The overlap with the split before, of every sample; None for the first."""
        before, self._before = self._before, kept_N.clone()
        if before is None:
            return None
        return float((before & kept_N).sum() / (before | kept_N).sum().clamp_min(1))

    @torch.no_grad()
    def measure(self, model: nn.Module, kept_N: Tensor) -> dict[str, float]:
        """`METRICS` but for the stability; those that cannot be measured are left out."""
        assert isinstance(model, Classifier)
        was_training = model.training
        model.eval()
        logits, features = [], []
        chunks = list(self._positions.split(FORWARD_BATCH))
        for pixels in self._images.batches(chunks):
            beat()
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
                found = model.backbone(augment.normalise(self._normalise, pixels))
                logits.append(model.head(found).float().cpu())
                features.append(found.float().cpu())
        model.train(was_training)
        labels = self._images.labels.cpu()[self._positions]
        return figures(torch.cat(logits), torch.cat(features), labels, kept_N[self._positions], self._withheld)


def figures(
    logits_BK: Tensor, features_BD: Tensor, labels_B: Tensor, kept_B: Tensor, withheld_B: Tensor
) -> dict[str, float]:
    """`METRICS` of a sample, but for the stability."""
    found: dict[str, float] = {}
    judged = kept_B & withheld_B
    if judged.any():
        found["withheld_agreement"] = float((logits_BK.argmax(1) == labels_B)[judged].float().mean())
    losses = F.cross_entropy(logits_BK, labels_B, reduction="none")
    if kept_B.any() and not kept_B.all():
        spread = losses.std(correction=0).clamp_min(1e-12)
        found["loss_gap"] = float((losses[~kept_B].mean() - losses[kept_B].mean()) / spread)
    if int(kept_B.sum()) > 1:
        found["knn_agreement"] = knn_agreement(features_BD[kept_B], labels_B[kept_B])
    return found


def knn_agreement(features_BD: Tensor, labels_B: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """The share of samples whose label is the most frequent one (the lowest of several) among its nearest neighbours by
    cosine, itself left out."""
    votes = neighbour_votes(features_BD, labels_B, int(labels_B.max()) + 1, neighbours)
    return float((votes.argmax(dim=1) == labels_B).float().mean())
