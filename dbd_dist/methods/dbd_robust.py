"""DBD that asks how labels are corrupted, leaves small groups out at first, and trains against triggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from dbd_dist.data.sampling import Draw
from dbd_dist.methods.method import Method
from dbd_dist.stages import MixMatch, SimCLR, Split, Stage, UniversalTraining, Warmup

LEAST_STEPS = 3000
"""Of fine-tuning, below which it is not shortened: 800 in place of 3,000 cost five points of accuracy on 14,250
photographs (docs/accuracy.md)."""

# Fields of the variants are declared without the metadata omit_default: keys have to tell them from the published ones.


@dataclass(frozen=True, kw_only=True)
class TrustedSplit(Split):
    """The filter of `dbd-robust`: images with a pattern that marks their label are done without; of the others as many
    labels of every class are kept as can be trusted; samples in small groups of their own wait for half of the
    epochs."""

    keep: float = 0.3
    keep_most: float = 0.9
    rule: Literal["global", "balanced", "mixture", "trusted"] = "trusted"
    score: Literal["loss", "neighbours", "both", "label-noise"] = "label-noise"
    scan: bool = True
    leave_out: float = 0.1
    leave_out_until: float = 0.5


@dataclass(frozen=True, kw_only=True)
class BalancedMixMatch(MixMatch):
    """MixMatch whose labelled batches hold every class equally often, however few labels of it are trusted.

    Of a long recipe a quarter, with an annealed rate: most labels are kept, so that there is less to guess.
    """

    draw: Draw = "balanced"

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        """The preset's settings with a quarter of its epochs, or as many as `LEAST_STEPS` need, and no more than it
        has."""
        full = super().from_preset(stages)
        if not isinstance(full, BalancedMixMatch):
            return full
        epochs = min(full.epochs, max(round(full.epochs / 4), math.ceil(LEAST_STEPS / full.steps)))
        return full if epochs == full.epochs else replace(full, epochs=epochs, lr_schedule="cosine")


@dataclass(frozen=True, kw_only=True)
class RobustDBD(Method):
    """DBD (Huang et al., ICLR 2022) with the changes that docs/accuracy.md measures.

    Images that carry a pattern which marks their label, as a linear function of the pixels sees it, are done without.
    How often each label is given to images of other classes is estimated where classes are sure; a label is kept where
    that rate and the sample's features leave little doubt, between 30 and 90 % of an equal share of every class, for
    DBD's half in one ranking of losses. A tenth of the samples, those that lie alone or in a small group among the
    self-supervised features, is left out for half of the fine-tuning. The fine-tuned model is then trained against
    universal perturbations, squares of noise and the patterns that were found, on the kept samples, which takes out
    what a trigger has left behind. Of a long fine-tuning a quarter is done, since
    most labels are kept.
    """

    name: ClassVar[str] = "dbd-robust"
    title: ClassVar[str] = "DBD, trusted labels and hardened"

    simclr: SimCLR = field(default_factory=SimCLR)
    warmup: Warmup = field(default_factory=Warmup)
    split: TrustedSplit = field(default_factory=TrustedSplit)
    mixmatch: BalancedMixMatch = field(default_factory=BalancedMixMatch)
    uat: UniversalTraining = field(default_factory=UniversalTraining)
