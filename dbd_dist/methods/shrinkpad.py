"""ShrinkPad (Li et al.: Backdoor Attack in the Physical World, ICLR 2021 workshop, arXiv 2104.02361)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from dbd_dist.methods.method import Method
from dbd_dist.stages import Shrink, Supervised
from dbd_dist.stages.shrink import ShrunkAndPadded


@dataclass(frozen=True, kw_only=True)
class ShrinkPad(Method):
    """Plain training; at test time images are made smaller and padded back at random places, so that a trigger is not
    where the model learnt it."""

    name: ClassVar[str] = "shrinkpad"
    title: ClassVar[str] = "ShrinkPad"
    defaults: ClassVar = {"*": {"shrink": Shrink()}}

    supervised: Supervised = field(default_factory=Supervised)
    shrink: Shrink = field(default_factory=Shrink)

    def at_test_time(self, model: nn.Module) -> nn.Module:
        return ShrunkAndPadded(model, self.shrink, self.supervised.augment.mean, self.supervised.augment.std)
