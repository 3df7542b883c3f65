"""What a detector hands on as "flagged": suspect samples and classes."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class Flagged(TypedDict):
    """Tensors on the CPU, the same on all ranks; None where a detector says nothing of it."""

    samples: Tensor | None
    """bool (N,): the training samples that are taken to be poisoned."""
    scores: Tensor | None
    """float32 (N,): how suspect each is, most suspect highest."""
    classes: Tensor | None
    """int64 (k,): the classes that are taken to be an attacker's target."""
    class_scores: Tensor | None
    """float32 (K,): how suspect each class is."""


def flag(
    *,
    samples: Tensor | None = None,
    scores: Tensor | None = None,
    classes: Tensor | None = None,
    class_scores: Tensor | None = None,
) -> Flagged:
    """Some of the four."""
    return Flagged(samples=samples, scores=scores, classes=classes, class_scores=class_scores)


def unflagged(flagged: Flagged) -> Tensor:
    """int64 (n,): positions of the samples that are left."""
    samples = flagged["samples"]
    assert samples is not None, "the detector flags no samples"
    return torch.nonzero(~samples).flatten()
