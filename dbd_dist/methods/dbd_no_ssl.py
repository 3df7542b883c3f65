"""DBD without its self-supervised stage: the first ablation of Huang et al. (ICLR 2022, arXiv 2202.03423, sec. 5.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import MixMatch, Split, Supervised, SupervisedWarmup


@dataclass(frozen=True, kw_only=True)
class DBDNoSSL(Method):
    """DBD on the backbone of plain supervised training in place of a self-supervised one."""

    name: ClassVar[str] = "dbd-no-ssl"
    title: ClassVar[str] = "DBD without SSL"

    supervised: Supervised = field(default_factory=Supervised)
    warmup: SupervisedWarmup = field(default_factory=SupervisedWarmup)
    split: Split = field(default_factory=Split)
    mixmatch: MixMatch = field(default_factory=MixMatch)
