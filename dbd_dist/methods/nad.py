"""Neural Attention Distillation (Li et al.: Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
Networks, ICLR 2021, arXiv 2101.05930)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Distillation, Supervised, Teacher


@dataclass(frozen=True, kw_only=True)
class NAD(Method):
    """Plain training; a copy is fine-tuned on clean images and teaches the model where to look. Needs clean images."""

    name: ClassVar[str] = "nad"
    title: ClassVar[str] = "NAD"
    needs_clean: ClassVar[bool] = True

    supervised: Supervised = field(default_factory=Supervised)
    teacher: Teacher = field(default_factory=Teacher)
    distillation: Distillation = field(default_factory=Distillation)
