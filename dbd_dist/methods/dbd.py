"""Backdoor Defense via Decoupling (Huang et al., ICLR 2022, arXiv 2202.03423)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import MixMatch, SimCLR, Split, Warmup


@dataclass(frozen=True, kw_only=True)
class DBD(Method):
    """The three-stage defence: features without labels, a head that ranks samples by how well they fit their label, and
    fine-tuning without the labels of the doubtful half."""

    name: ClassVar[str] = "dbd"
    title: ClassVar[str] = "DBD"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=Warmup)
    split: Split = field(default_factory=Split)
    mixmatch: MixMatch = field(default_factory=MixMatch)
