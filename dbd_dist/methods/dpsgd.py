"""DPSGD against backdoors (Du et al.: Robust Anomaly Detection and Backdoor Attack Detection via Differential Privacy,
ICLR 2020, arXiv 1911.07116; the algorithm is that of Abadi et al. 2016, arXiv 1607.00133)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.models.config import ModelConfig
from dbd_dist.stages import DPSGD as PrivateTraining


@dataclass(frozen=True, kw_only=True)
class DPSGD(Method):
    """Training with clipped and noised gradients, in which no small group of images counts for much. The network has
    group norm in place of batch norm."""

    name: ClassVar[str] = "dpsgd"
    title: ClassVar[str] = "DPSGD"

    dpsgd: PrivateTraining = field(default_factory=PrivateTraining)

    @classmethod
    def network(cls, model: ModelConfig) -> ModelConfig:
        return replace(model, norm="group")
