"""Adap-Patch (Qi et al., ICLR 2023, "Revisiting the assumption of latent separability for backdoor
defenses"): one faint patch in training, opaque ones at test time, covers that keep their label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_prep.attacks.adap_blend import check_cover_ratio
from data_prep.attacks.attack import PoisonLabel, Trigger, check_seed, sample_rng
from data_prep.attacks.badnets import checkerboard
from data_prep.attacks.blended import blended, check_alpha
from data_prep.errors import UserError


def adap_patch(images: np.ndarray, patches: Sequence[tuple[np.ndarray, int, int, float]]) -> np.ndarray:
    """Blend patches in, each in its place.

    Args:
        images: uint8 (B, H, W, 3).
        patches: of each uint8 (h, h, 3) pixels, the row and column of its upper left corner, and its share.

    Returns:
        uint8 (B, H, W, 3), a copy.
    """
    stamped = images.copy()
    for patch, row, col, alpha in patches:
        area = (slice(None), slice(row, row + len(patch)), slice(col, col + len(patch)))
        stamped[area] = blended(stamped[area], patch, alpha)
    return stamped


@dataclass(frozen=True, kw_only=True)
class AdapPatch(PoisonLabel):
    """One of four faint patches on each training image, two opaque ones at test time; covers keep their label (Qi et
    al. 2023). They poison as little as 0.3 % (rate 0.003).

    The paper's patches are pictures; ours, in the four corners, are two squares of colour noise, a checkerboard and a
    white square.
    """

    name: ClassVar[str] = "adap-patch"

    patch_px: int | None = None
    """Side of each patch; without it a fifth of the image."""
    opacities: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3)
    """Share of each patch in training: top left, top right, bottom right, bottom left."""
    test_patches: tuple[int, ...] = (0, 2)
    """Which patches test images carry, all of them at once."""
    test_opacity: float = 1.0
    """Their share at test time."""
    cover_ratio: float = 2.0
    """Covers for each poisoned image."""
    pattern_seed: int = 0
    """Seed of the noise and of which patch an image gets."""

    def __post_init__(self):
        for alpha in self.opacities:
            check_alpha(alpha, "opacities")
        check_alpha(self.test_opacity, "test_opacity")
        if not self.test_patches or not set(self.test_patches) <= set(range(4)):
            raise UserError(f"test_patches is {self.test_patches}", where="test_patches", expected="some of 0, 1, 2, 3")
        if self.patch_px is not None and self.patch_px < 1:
            raise UserError(f"the patch has {self.patch_px} pixels", where="patch_px", expected="1 or more")
        check_cover_ratio(self.cover_ratio)
        check_seed(self.pattern_seed, "pattern_seed")

    @property
    def covers_per_poisoned(self) -> float:
        return self.cover_ratio

    def patches(self, image_px: int) -> list[tuple[np.ndarray, int, int]]:
        """The four patches, uint8 (h, h, 3), with the row and column of their upper left corners.

        Raises:
            UserError: they do not fit beside each other.
        """
        side = self.patch_px if self.patch_px is not None else max(3, round(image_px / 5))
        if 2 * side > image_px:
            raise UserError(
                f"patches of {side} px overlap on images of {image_px} px",
                where="patch_px",
                expected=f"1 to {image_px // 2}",
            )
        rng, far = np.random.default_rng(self.pattern_seed), image_px - side
        noise = rng.integers(0, 256, size=(2, side, side, 3), dtype=np.uint8)
        white = np.full((side, side, 3), 255, dtype=np.uint8)
        return [(noise[0], 0, 0), (noise[1], 0, far), (checkerboard(side), far, far), (white, far, 0)]

    def train_trigger(self, image_px: int) -> Trigger:
        patches = [(*patch, alpha) for patch, alpha in zip(self.patches(image_px), self.opacities)]

        def trigger(images: np.ndarray, index: np.ndarray) -> np.ndarray:
            chosen = np.array([sample_rng(self.pattern_seed, int(i)).integers(len(patches)) for i in index])
            out = images.copy()
            for which, patch in enumerate(patches):
                out[chosen == which] = adap_patch(images[chosen == which], [patch])
            return out

        return trigger

    def test_trigger(self, image_px: int) -> Trigger:
        patches = self.patches(image_px)
        shown = [(*patches[which], self.test_opacity) for which in sorted(set(self.test_patches))]
        return lambda images, index: adap_patch(images, shown)
