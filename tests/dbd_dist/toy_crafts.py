"""Two crafted attacks as somebody else's package would have them: one file's worth each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.attacks.crafted import OptimisedPattern, PerturbedImages
from dbd_dist.craft.craft import Network, Work
from dbd_dist.craft.images import PerImage
from dbd_dist.craft.trigger import OptimisedTrigger
from dbd_dist.data.loaders import Images


@dataclass(frozen=True, kw_only=True)
class OneStepAttack(PerturbedImages):
    """Images of the target class, made hard to recognise, with a white line."""

    name: ClassVar[str] = "one-step"

    def stamp(self, image_px: int) -> Callable[[np.ndarray], np.ndarray]:
        def line(images: np.ndarray) -> np.ndarray:
            stamped = images.copy()
            stamped[:, 0] = 255
            return stamped

        return line


@dataclass(frozen=True, kw_only=True)
class OneStep(PerImage):
    """Images moved by one step along the sign of the gradient (Goodfellow et al., ICLR 2015, arXiv 1412.6572)."""

    attack = OneStepAttack
    network = "surrogate"

    eps: int = 8
    """Length of the step in grey levels."""

    def perturb(
        self, network: Network, images_BCHW: Tensor, index_B: Tensor, tick: Callable[[int, int], None]
    ) -> tuple[Tensor, Tensor]:
        grey = images_BCHW.float().requires_grad_()
        labels = torch.full((len(grey),), self.target, device=grey.device)
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(grey), labels, reduction="sum"), grey)
        tick(1, 1)
        failed = (~gradient.isfinite().all()).long()
        return (grey.detach() + self.eps * gradient.sign()).clamp(0, 255).to(torch.uint8), failed


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(OptimisedPattern):
    """A pattern that turns a classifier to the target class."""

    name: ClassVar[str] = "universal"


@dataclass(frozen=True, kw_only=True)
class Universal(OptimisedTrigger):
    """A pattern that a classifier takes for the target class (Moosavi-Dezfooli et al., CVPR 2017, arXiv 1610.08401)."""

    attack = UniversalAttack
    network = "surrogate"

    def reference(self, network: Network, images: Images, work: Work) -> Tensor:
        return torch.tensor(self.target, device=work.world.device)

    def terms(self, outputs_BD: Tensor, reference: Tensor) -> dict[str, Tensor]:
        return {"objective": F.cross_entropy(outputs_BD, reference.expand(len(outputs_BD)))}
