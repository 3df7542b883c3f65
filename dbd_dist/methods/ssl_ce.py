"""Self-supervised backbone and a head trained with cross-entropy on everything: an ablation of Huang et al. (ICLR 2022,
arXiv 2202.03423, sec. 5.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from dbd_dist.methods.method import Method
from dbd_dist.methods.ssl_sce import check_loss
from dbd_dist.stages import SimCLR, Stage, Warmup


@dataclass(frozen=True, kw_only=True)
class SSLWithCE(Method):
    """Decoupling alone: a self-supervised backbone, and a head trained with plain cross-entropy."""

    name: ClassVar[str] = "ssl-ce"
    title: ClassVar[str] = "SSL + CE"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=lambda: Warmup(loss="ce"))

    def __post_init__(self):
        super().__post_init__()
        check_loss(self.warmup, "ce", self.name)

    @classmethod
    def from_stages(cls, stages: Mapping[str, Stage], preset: str) -> Self:
        warmup = stages.get("warmup")
        if isinstance(warmup, Warmup):
            stages = {**stages, "warmup": replace(warmup, loss="ce")}
        return super().from_stages(stages, preset)
