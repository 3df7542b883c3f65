"""Plain training, the baseline of every table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dbd_dist.methods.method import Method
from dbd_dist.stages import Supervised


@dataclass(frozen=True, kw_only=True)
class NoDefense(Method):
    """Plain supervised training on the given labels, which a backdoor gets into."""

    name: ClassVar[str] = "none"
    title: ClassVar[str] = "No defence"
    defends: ClassVar[bool] = False

    supervised: Supervised = field(default_factory=Supervised)
