"""Named settings: what the same attack means in different papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SettingName = Literal["paper", "released", "bench"]
Selection = Literal["exact", "coin"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The numbers that a setting decides where they are not given."""

    target: int
    rate: float
    """Poisoned share of all training images, for attacks that change labels."""
    clean_label_rate: float
    """The same for clean-label attacks, whose images are all of the target class."""
    blend_alpha: float
    """Of Blended."""
    selection: Selection
    """exact: so many images, drawn without replacement. coin: one toss an image of any class, and those of the target
    class are left out, so that fewer than the rate are poisoned (4.5 % for 5 % of ten equal classes)."""


SETTINGS: dict[SettingName, Setting] = {
    # Huang et al., ICLR 2022: 2.5 % is a quarter of the target class of CIFAR-10
    "paper": Setting(target=3, rate=0.05, clean_label_rate=0.025, blend_alpha=0.1, selection="exact"),
    # their published code
    "released": Setting(target=3, rate=0.05, clean_label_rate=0.025, blend_alpha=0.1, selection="coin"),
    # the public benchmarks; their 10 % clean-label would be the whole target class, half of it is our choice
    "bench": Setting(target=0, rate=0.1, clean_label_rate=0.05, blend_alpha=0.2, selection="exact"),
}
