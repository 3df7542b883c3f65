"""What the article and its code state, to stand beside our numbers. CIFAR-10, ResNet-18, target 3, 5 % poisoned.

Huang et al., ICLR 2022 (arXiv 2202.03423); figures of BadNets and Blended from the README of its code, those of the
filter from the authors' reply to its reviewers.
"""

from __future__ import annotations

WHAT = (
    "The article: CIFAR-10 with ResNet-18, 5 % poisoned (label-consistent: a quarter of the target class); numbers of "
    "BadNets and Blended as the README of its code states them, most suspect samples as its authors told its reviewers."
)

ACCURACY_ASR = {
    ("badnets", "none"): "95.13 / 100",
    ("badnets", "dbd"): "92.50 / 0.88",
    ("blended", "none"): "94.26 / 98.15",
    ("blended", "dbd"): "92.60 / 0.31",
    ("adaptive", "none"): "94.96 / 99.70",
    ("adaptive", "dbd"): "93.21 / 1.02",
    ("wanet", "dbd"): "at most 2 below no defence / below 2",
    ("label-consistent", "dbd"): "– / below 2",
    **{
        (attack, "dpsgd"): "more than 20 below / 5 above DBD"
        for attack in ("badnets", "blended", "wanet", "label-consistent")
    },
}
"""(case, method) -> clean accuracy and attack success in percent."""

FOUND = {
    ("badnets", "dbd"): "100 / 97.6 / 90.9",
    ("blended", "dbd"): "97.9 / 94.7 / 87.3",
    ("wanet", "dbd"): "100 / 100 / 99.5",
    ("wanet", "spectral"): "0 / 0 / 1.0",
}
"""(case, method) -> percent of poisoned samples among the 250, 500 and 1,000 most suspect of the target class."""
