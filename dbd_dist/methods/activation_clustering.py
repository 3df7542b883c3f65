"""Activation clustering (Chen et al.: Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering,
SafeAI at AAAI 2019, arXiv 1811.03728)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Clustering, Retrain, Supervised


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(Method):
    """Trains without defence, drops the smaller cluster of every class whose features form two, and trains again."""

    name: ClassVar[str] = "activation-clustering"
    title: ClassVar[str] = "Activation Clustering"
    defaults: ClassVar[Any] = {"*": {"clustering": Clustering()}}

    supervised: Supervised = field(default_factory=Supervised)
    clustering: Clustering = field(default_factory=Clustering)
    retrain: Retrain = field(default_factory=Retrain)
