"""Anti-Backdoor Learning (Li et al.: Anti-Backdoor Learning: Training Clean Models on Poisoned Data, NeurIPS 2021,
arXiv 2110.11571)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Finetuning, Isolation, Unlearning


@dataclass(frozen=True, kw_only=True)
class AntiBackdoorLearning(Method):
    """Isolates the samples that are learnt fastest, trains on without them, and unlearns them by gradient ascent."""

    name: ClassVar[str] = "abl"
    title: ClassVar[str] = "ABL"

    isolation: Isolation = field(default_factory=Isolation)
    finetuning: Finetuning = field(default_factory=Finetuning)
    unlearning: Unlearning = field(default_factory=Unlearning)
