"""Protocols: what the same attack means in different papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["paper", "released", "ten-percent"]
Selection = Literal["exact", "coin"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The numbers that a protocol decides where they are not given. An attack's own: `Attack.with_protocol`."""

    target: int
    rate: float
    """Poisoned share of all training images, for attacks that change labels."""
    clean_label_rate: float | None
    """The same for clean-label attacks, whose images are all of the target class; None where there are none."""
    selection: Selection
    """exact: so many images, drawn without replacement. coin: one toss an image of any class, and those of the target
    class are left out, so that fewer than the rate are poisoned (4.5 % for 5 % of ten equal classes)."""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    # Huang et al., ICLR 2022: 2.5 % is a quarter of the target class of CIFAR-10
    "paper": Protocol(target=3, rate=0.05, clean_label_rate=0.025, selection="exact"),
    # their published code, which has no clean-label attack
    "released": Protocol(target=3, rate=0.05, clean_label_rate=None, selection="coin"),
    # what public benchmarks have in common. The rest of their settings differs from the defaults here, so it bears none
    # of their names. Their 10 % clean-label would be the whole target class, half of it is our choice
    "ten-percent": Protocol(target=0, rate=0.1, clean_label_rate=0.05, selection="exact"),
}
