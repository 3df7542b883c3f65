"""Spectral signatures: poisoned samples stand out along the main direction of a class's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dbd_dist.fields import require
from dbd_dist.stages.detector import Detector, Examined


@dataclass(frozen=True, kw_only=True)
class Spectral(Detector):
    """Spectral signatures (Tran et al., NeurIPS 2018, arXiv 1811.00636, algorithm 1): of every class, flag the samples
    that lie furthest from the mean along the top singular direction of the features."""

    name: ClassVar[str] = "spectral"
    title: ClassVar[str] = "Spectral Signatures"

    expected_rate: float = 0.1
    """Expected share of poisoned samples among those given one class: the paper's epsilon over the size of the class,
    5 and 10 % in its experiments. An attack of one target class has all its samples there."""
    factor: float = 1.5
    """How many times the expected number of poisoned samples is flagged, in every class (paper: 1.5)."""

    def __post_init__(self):
        super().__post_init__()
        require(self, self.name, expected_rate="in (0, 1)", factor="> 0")

    def examine(self, features_nD: Tensor, seed: int) -> Examined:
        scores = outlier_scores(features_nD)
        count = min(round(self.factor * self.expected_rate * len(scores)), len(scores) - 1)
        samples = torch.zeros(len(scores), dtype=torch.bool)
        samples[torch.argsort(-scores, stable=True)[:count]] = True
        return Examined(samples, scores)


def outlier_scores(features_nD: Tensor) -> Tensor:
    """float64 (n,): squared projections of the centred features on their top right singular vector."""
    centred = features_nD.double() - features_nD.double().mean(dim=0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    return (centred @ direction) ** 2
