"""Neural Cleanse (Wang et al.: Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks, IEEE
S&P 2019)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Inversion, Patching, Supervised


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(Method):
    """Trains without defence, finds for every class the smallest trigger that leads to it, and unlearns those that are
    far too small; needs clean images."""

    name: ClassVar[str] = "nc"
    title: ClassVar[str] = "Neural Cleanse"
    needs_clean: ClassVar[bool] = True
    defaults: ClassVar[Any] = {"*": {"inversion": Inversion()}}

    supervised: Supervised = field(default_factory=Supervised)
    inversion: Inversion = field(default_factory=Inversion)
    patching: Patching = field(default_factory=Patching)
