"""DBD with a split by class and heaps of losses, and triggers unlearnt at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import MixMatch, SimCLR, Split, UniversalTraining, Warmup


@dataclass(frozen=True, kw_only=True)
class RobustDBD(Method):
    """DBD whose split looks at every class by itself, and that unlearns what a trigger could do at the end."""

    name: ClassVar[str] = "dbd-robust"
    title: ClassVar[str] = "DBD, robust"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=Warmup)
    split: Split = field(default_factory=Split)
    mixmatch: MixMatch = field(default_factory=MixMatch)
    uat: UniversalTraining = field(default_factory=UniversalTraining)
