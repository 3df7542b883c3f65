"""The label-consistent attack (Turner et al. 2019, arXiv 1912.02771): perturbed images of the target class, with a
patch in each corner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

import dbd_dist.craft.pgd as pgd
from data_prep.attacks.attack import trigger_image
from data_prep.attacks.badnets import badnets, checkerboard, default_patch_px
from data_prep.attacks.crafted import PerturbedImages
from data_prep.errors import UserError
from dbd_dist.craft.craft import Network
from dbd_dist.craft.images import PerImage
from dbd_dist.fields import require


def stamp_corners(images: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Stamp a patch into all four corners (sec. 5.2).

    Args:
        images: uint8 (B, H, W, 3); in training, the perturbed ones.
        patch: uint8 (h, h, 3), as it is in both left corners; mirrored left to right in the right ones.

    Returns:
        uint8 (B, H, W, 3), a copy.
    """
    height, width = images.shape[1] - len(patch), images.shape[2] - len(patch)
    for row in (0, height):
        for col, stamp in ((0, patch), (width, patch[:, ::-1])):
            images = badnets(images, stamp, row, col)
    return images


def corner_patch(patch_px: int) -> np.ndarray:
    """The patch of Turner et al.: a 3 x 3 checkerboard whose upper inner corner is black too. In the four corners of
    an image of 32 px the pixels (0, 2), (0, 29), (29, 2) and (29, 29) are black.

    Returns:
        uint8 (patch_px, patch_px, 3), of the left corners.
    """
    patch = checkerboard(patch_px)
    cell = np.arange(patch_px) * 3 // patch_px
    patch[np.ix_(cell == 0, cell == 2)] = 0
    return patch


@dataclass(frozen=True, kw_only=True)
class LabelConsistentAttack(PerturbedImages):
    """Images of the target class, made hard to recognise by an adversarial perturbation and stamped in all corners;
    labels stay (Turner et al. 2019). Test images are stamped only."""

    name: ClassVar[str] = "label-consistent"

    patch_px: int | None = None
    """Side of each of the four patches; without it that of the pattern's file, or 3 px for images up to 32 px and 3/32
    of the image above."""
    pattern: Literal["turner", "checkerboard"] | Path = "turner"
    """What the patches show: the authors' pattern, a whole checkerboard, or a square opaque image file, which is
    resized where patch-px is given. Mirrored left to right in the right corners."""

    def __post_init__(self):
        if self.patch_px is not None and self.patch_px < 1:
            raise UserError(f"the patch has {self.patch_px} pixels", where="patch_px", expected="1 or more")

    def stamp(self, image_px: int) -> Callable[[np.ndarray], np.ndarray]:
        if isinstance(self.pattern, Path):
            patch = trigger_image(self.pattern, self.patch_px, resize=True, hint="crop it, or give patch_px")
        else:
            draw = corner_patch if self.pattern == "turner" else checkerboard
            patch = draw(self.patch_px if self.patch_px is not None else default_patch_px(image_px))
        if 2 * len(patch) > image_px:
            what = f"four patches of {len(patch)} px do not fit an image of {image_px} px"
            raise UserError(what, where="patch_px", expected=f"1 to {image_px // 2}")
        return lambda images: stamp_corners(images, patch)


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(PerImage):
    """Perturbed images for the label-consistent attack (Turner et al. 2019, arXiv 1912.02771).

    Images of the target class are made hard to recognise by PGD against a benignly trained surrogate, so that a
    network that is trained on them leans on the trigger that `dbd prepare SOURCE label-consistent` stamps on top.
    Labels stay as they are.
    """

    attack = LabelConsistentAttack
    network = "surrogate"

    norm: pgd.Norm = "linf"
    """Norm of the ball around each image that its perturbation stays in."""
    eps: float = 8.0
    """Radius of the ball in grey levels (of 255): linf, what one value may change by; l2, the length of the whole
    difference. Turner et al. use 8 to 32 and 300 to 1,200 on CIFAR-10; 16 is usual on ImageNet."""
    step: float = 1.5
    """Length of a step, in the unit of eps."""
    steps: int = 100
    """Steps of PGD."""
    start: Literal["zero", "random"] = "zero"
    """Where PGD starts. zero: at the image, as the authors' code does. random: at a point drawn uniformly from the
    ball."""
    seed: int = 0
    """Seed of the choice of images (`dbd prepare` needs the same), of the random start, and of the surrogate where it
    is trained here."""

    def __post_init__(self):
        require(self, "craft", eps="in (0, 255]" if self.norm == "linf" else "> 0", step="> 0", steps=">= 1")
        if self.norm == "linf" and self.eps < 1:
            what = f"{self.eps!r} changes no pixel: images have whole grey levels"
            raise UserError(what, where="craft.eps", expected="1 to 255")
        super().__post_init__()

    def perturb(
        self, network: Network, images_BCHW: Tensor, index_B: Tensor, tick: Callable[[int, int], None]
    ) -> tuple[Tensor, Tensor]:
        px, device = images_BCHW.shape[-1], images_BCHW.device
        labels = torch.full((len(images_BCHW),), self.target, device=device)
        if self.start == "random":
            starts = pgd.random_starts(index_B.tolist(), px, norm=self.norm, eps=self.eps, seed=self.seed)
        else:
            starts = torch.zeros(images_BCHW.shape)
        starts = starts.to(device, memory_format=torch.channels_last)
        size = {"norm": self.norm, "eps": self.eps, "step": self.step, "steps": self.steps}
        return pgd.perturb(network, images_BCHW, labels, starts, **size, tick=lambda step: tick(step, self.steps))
