"""Crafted attacks: those that need a trained model. One attack a file; a new one is one more line here.

The attacker's side of the project; nothing of the defence imports it.
"""

from data_prep.registry import Registry
from dbd_dist.craft.adaptive import Adaptive
from dbd_dist.craft.craft import Craft
from dbd_dist.craft.label_consistent import LabelConsistent

CRAFTS: Registry[type[Craft]] = Registry(
    "crafts",
    {
        "label-consistent": LabelConsistent,
        "adaptive": Adaptive,
    },
    base=Craft,
    needs=("attack", "name", "network"),
)
"""Name -> class, as `dbd craft NAME` and `dbd prepare SOURCE NAME` have it."""
