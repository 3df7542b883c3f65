"""SSL + SCE with the head tuned on the samples that the split keeps: an ablation of Huang et al. (ICLR 2022, arXiv
2202.03423, sec. 5.3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.methods.ssl_sce import check_loss
from dbd_dist.stages import SimCLR, Split, TuneHead, Warmup


@dataclass(frozen=True, kw_only=True)
class SSLWithSCETuned(Method):
    """DBD with its last stage replaced by tuning the head on the labels that are kept."""

    name: ClassVar[str] = "ssl-sce-tuned"
    title: ClassVar[str] = "SSL + SCE, tuned"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=Warmup)
    split: Split = field(default_factory=Split)
    tune: TuneHead = field(default_factory=TuneHead)

    def __post_init__(self):
        super().__post_init__()
        check_loss(self.warmup, "sce", self.name)
