"""The adaptive attack (Huang et al., ICLR 2022, arXiv 2202.03423, sec. 5.4): a trigger optimised so that poisoned
images cluster in a self-supervised feature space."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.attacks.crafted import OptimisedPattern
from dbd_dist.craft.craft import Network, TrainingSet, Work
from dbd_dist.craft.trigger import FORWARD_BATCH, OptimisedTrigger
from dbd_dist.data.loaders import Images
from dbd_dist.data.sampling import rank_slice
from dbd_dist.fields import require


@dataclass(frozen=True, kw_only=True)
class AdaptiveAttack(OptimisedPattern):
    """A pattern optimised by an attacker who knows DBD: poisoned images are to cluster in the feature space of a
    self-supervised network too (Huang et al. 2022, sec. 5.4)."""

    name: ClassVar[str] = "adaptive"


@dataclass(frozen=True, kw_only=True)
class Adaptive(OptimisedTrigger):
    """A trigger for the adaptive attack (Huang et al., ICLR 2022, arXiv 2202.03423, sec. 5.4).

    The attacker knows the defence and the architecture, and optimises the trigger so that poisoned images cluster in
    the feature space of a self-supervised backbone. To be minimised: the mean distance of poisoned features to their
    own centre, minus the mean distance of that centre to the centres of the benign classes. The article states neither
    distance nor optimiser, steps or size of the trigger: those here are this project's.
    """

    attack = AdaptiveAttack
    network = "backbone"

    distance: Literal["l2", "cosine"] = "l2"
    """Distance between features. The article states none."""
    normalise_features: bool = True
    """Scale features to length 1 first, which bounds the objective: without it, it falls without end as features
    grow. The article states none."""
    separation: float = field(default=1.0, metadata={"omit_default": True})
    """Weight of the distance to the benign centres against that to the own centre."""
    target: int = 3
    """The target class, from 0: its images are not poisoned, and so not optimised on."""
    seed: int = 0
    """Seed of the first pattern, of the batches, and of the backbone where it is trained here."""

    def __post_init__(self):
        super().__post_init__()
        require(self, "craft", separation=">= 0")

    def outputs(self, network: Network, grey_BCHW: Tensor) -> Tensor:
        features = network(grey_BCHW).float()
        return F.normalize(features, dim=1) if self.normalise_features else features

    @torch.no_grad()
    def reference(self, network: Network, images: Images, work: Work) -> Tensor:
        """The mean feature of each class over all training images as they are: (K, D). Classes without images are left
        out."""
        positions = torch.arange(len(images))[rank_slice(len(images), work.world.rank, work.world.size)]
        chunks = list(positions.split(FORWARD_BATCH))
        sums: Tensor | None = None
        for index, pixels in zip(chunks, images.batches(chunks), strict=True):
            found = self.outputs(network, pixels.float()).double()
            if sums is None:
                sums = found.new_zeros(work.data.num_classes, found.shape[1] + 1)
            counted = torch.cat([found, found.new_ones(len(found), 1)], dim=1)
            sums.index_add_(0, images.labels[index.to(images.labels.device)], counted)
        assert sums is not None
        sums = work.world.sum(sums)
        there = sums[:, -1] > 0
        return (sums[there, :-1] / sums[there, -1:]).float()

    def terms(self, outputs_BD: Tensor, reference: Tensor) -> dict[str, Tensor]:
        own, benign = distances(outputs_BD, reference, self.distance)
        return {
            "objective": own - self.separation * benign,
            "distance_to_own_centre": own,
            "distance_to_benign_centres": benign,
        }

    def collect(self, data: TrainingSet, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, evidence = super().collect(data, folder)
        return arrays, {"distance": self.distance, **evidence}


def distances(features_BD: Tensor, centres_KD: Tensor, distance: Literal["l2", "cosine"]) -> tuple[Tensor, Tensor]:
    """The two terms of the objective: the mean distance of features to their own centre, and the mean distance of that
    centre to the benign centres. The first minus the second is to be minimised."""
    centre = features_BD.mean(dim=0, keepdim=True)

    def apart(x: Tensor, y: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - F.cosine_similarity(x, y, dim=1)
        return torch.linalg.vector_norm(x - y, dim=1)

    return apart(features_BD, centre).mean(), apart(centres_KD, centre).mean()
