"""Spectral signatures (Tran, Li, Madry: Spectral Signatures in Backdoor Attacks, NeurIPS 2018, arXiv 1811.00636)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Retrain, Spectral, Supervised


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(Method):
    """Trains without defence, drops of every class the samples that stand out in feature space, and trains again."""

    name: ClassVar[str] = "spectral"
    title: ClassVar[str] = "Spectral Signatures"
    defaults: ClassVar[Any] = {"*": {"spectral": Spectral()}}

    supervised: Supervised = field(default_factory=Supervised)
    spectral: Spectral = field(default_factory=Spectral)
    retrain: Retrain = field(default_factory=Retrain)
