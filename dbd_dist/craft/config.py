"""What an artefact is made with: frozen dataclasses whose docstrings are the command's help, checked when they are
built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from data_prep.errors import UserError
from data_prep.plan import check_rate
from dbd_dist.fields import require


@dataclass(frozen=True, kw_only=True)
class LabelConsistentConfig:
    """Perturbed images for the label-consistent attack (Turner et al. 2019, arXiv 1912.02771).

    Images of the target class are made hard to recognise by PGD against a benignly trained surrogate, so that a
    network that is trained on them leans on the trigger that `dbd prepare` stamps on top. Labels stay as they are.
    """

    kind: ClassVar[str] = "label-consistent"

    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball around each image that its perturbation stays in."""
    eps: float = 8.0
    """Radius of the ball in grey levels (of 255): linf, what one value may change by; l2, the length of the whole
    difference. Turner et al. use 8 to 32 and 300 to 1,200 on CIFAR-10; 16 is usual on ImageNet."""
    step: float = 1.5
    """Length of a step, in the unit of eps."""
    steps: int = 100
    """Steps of PGD."""
    rate: float = 0.025
    """Share of all training images to poison; they come from the target class alone. `dbd prepare` needs the same."""
    target: int = 3
    """The target class, from 0; `dbd prepare` needs the same."""
    seed: int = 0
    """Seed of the choice of images (`dbd prepare` needs the same), of the random start, and of the surrogate where it
    is trained here."""
    batch: int = 128
    """Images that one worker perturbs at a time; each batch is kept, and not made again after a crash."""

    def __post_init__(self):
        require(
            self, "craft", eps="in (0, 255]" if self.norm == "linf" else "> 0", step="> 0", steps=">= 1",
            target=">= 0", seed=">= 0", batch=">= 1",
        )  # fmt: skip
        if self.norm == "linf" and self.eps < 1:
            raise UserError(
                f"{self.eps!r} changes no pixel: images have whole grey levels", where="craft.eps", expected="1 to 255"
            )
        check_rate(self.rate)


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """A trigger for the adaptive attack (Huang et al., ICLR 2022, arXiv 2202.03423, sec. 5.4).

    The attacker knows the defence and the architecture, and optimises the trigger so that poisoned images cluster in
    the feature space of a self-supervised backbone. To be minimised: the mean distance of poisoned features to their
    own centre, minus the mean distance of that centre to the centres of the benign classes. The article states neither
    distance nor optimiser, steps or size of the trigger: those here are this project's.
    """

    kind: ClassVar[str] = "adaptive"

    optimise: Literal["pattern", "pattern-and-mask"] = "pattern"
    """pattern: the mask is fixed by alpha and patch-px. pattern-and-mask: the mask too, under mask-budget."""
    alpha: float | None = None
    """Share of the pattern within a fixed mask. Default: 0.1 over a whole image, 1 within a patch."""
    patch_px: int | None = None
    """Side of a fixed mask's square; without it the mask is the whole image."""
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right"] = "bottom-right"
    """Where the square sits."""
    mask_budget: float = 0.1
    """What the mean of an optimised mask is kept at or below."""
    distance: Literal["l2", "cosine"] = "l2"
    """Distance between features. The article states none."""
    normalise_features: bool = True
    """Scale features to length 1 first, which bounds the objective: without it, it falls without end as features
    grow. The article states none."""
    steps: int = 500
    """Steps of Adam."""
    lr: float = 0.1
    """Learning rate of Adam, on the logits of pattern and mask."""
    batch: int = 128
    """Images a step over all workers, drawn from the training images outside the target class."""
    target: int = 3
    """The target class, from 0: its images are not poisoned, and so not optimised on."""
    seed: int = 0
    """Seed of the first pattern, of the batches, and of the backbone where it is trained here."""

    def __post_init__(self):
        require(
            self, "craft", alpha="in (0, 1]", patch_px=">= 1", mask_budget="in (0, 1]", steps=">= 1", lr="> 0",
            batch=">= 2", target=">= 0", seed=">= 0",
        )  # fmt: skip
        if self.alpha is not None and self.alpha * 255 < 0.5:
            raise UserError(
                f"{self.alpha!r} changes no pixel: masks have steps of 1/255",
                where="craft.alpha",
                expected="0.002 to 1",
            )
        if self.optimise == "pattern-and-mask" and (self.alpha is not None or self.patch_px is not None):
            raise UserError(
                "alpha and patch_px describe a fixed mask, and this one is optimised",
                where="craft.alpha, craft.patch_px",
                expected="mask_budget, or optimise pattern",
            )

    @property
    def share(self) -> float:
        """Of the pattern within a fixed mask."""
        if self.alpha is not None:
            return self.alpha
        return 0.1 if self.patch_px is None else 1.0


CraftConfig = LabelConsistentConfig | AdaptiveConfig
CONFIGS: dict[str, type[LabelConsistentConfig] | type[AdaptiveConfig]] = {
    c.kind: c for c in (LabelConsistentConfig, AdaptiveConfig)
}
