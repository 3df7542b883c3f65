"""Adap-Blend (Qi et al., ICLR 2023, "Revisiting the assumption of latent separability for backdoor
defenses"): parts of a pattern in training, the whole pattern at test time, covers that keep their label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_prep.attacks.attack import PoisonLabel, Trigger, check_seed, sample_rng
from data_prep.attacks.blended import blended, check_alpha, full_pattern
from data_prep.errors import UserError


def adap_blend(images: np.ndarray, pattern: np.ndarray, alpha: float, shown: np.ndarray) -> np.ndarray:
    """Blend only some pieces of a pattern in, other ones for each image.

    Args:
        images: uint8 (B, H, W, 3).
        pattern: uint8 (H, W, 3).
        alpha: the pattern's share where it is shown.
        shown: bool (B, p, p): which pieces of a p x p division of the image are blended. Piece r, c holds the pixels
            y, x with r = y p // H, c = x p // W.

    Returns:
        uint8 (B, H, W, 3), a new array.
    """
    _, height, width, _ = images.shape
    pieces = shown.shape[1]
    row, column = np.arange(height) * pieces // height, np.arange(width) * pieces // width
    return np.where(shown[:, row[:, None], column[None, :], None], blended(images, pattern, alpha), images)


def check_cover_ratio(value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"ratio {value} is out of range", where="cover_ratio", expected="0 or more")


@dataclass(frozen=True, kw_only=True)
class AdapBlend(PoisonLabel):
    """Blended with a random half of the pattern in training and the whole pattern at test time; covers keep their
    label (Qi et al. 2023). They poison as little as 0.3 % (rate 0.003)."""

    name: ClassVar[str] = "adap-blend"
    revision: ClassVar[int] = 2  # 1: a coin for each part

    alpha: float = 0.15
    """Share of the pattern in training."""
    test_alpha: float = 0.2
    """Share of the pattern at test time."""
    pattern: Literal["noise"] | Path = "noise"
    """What is mixed in: uniform random noise, or an opaque image file of the images' size."""
    resize_pattern: bool = False
    """Resize a pattern of another size (bilinear)."""
    pieces: int = 4
    """The pattern is cut into pieces x pieces parts."""
    shown: float = 0.5
    """Share of the parts that are blended into a training image: 8 of 16, as the authors have it, drawn anew for each.
    Rounded to a whole number of parts, halves up, at least one."""
    cover_ratio: float = 1.0
    """Covers for each poisoned image."""
    pattern_seed: int = 0
    """Seed of the noise and of the parts."""

    def __post_init__(self):
        check_alpha(self.alpha, "alpha")
        check_alpha(self.test_alpha, "test_alpha")
        if self.pieces < 1:
            raise UserError(f"the pattern has {self.pieces} pieces", where="pieces", expected="1 or more")
        if not 0 < self.shown <= 1:
            raise UserError(f"share {self.shown} is out of range", where="shown", expected="above 0 and at most 1")
        check_cover_ratio(self.cover_ratio)
        check_seed(self.pattern_seed, "pattern_seed")

    @property
    def covers_per_poisoned(self) -> float:
        return self.cover_ratio

    def _pattern(self, image_px: int) -> np.ndarray:
        if self.pieces > image_px:
            raise UserError(
                f"{self.pieces} pieces do not fit {image_px} px", where="pieces", expected=f"at most {image_px}"
            )
        return full_pattern(self.pattern, self.pattern_seed, image_px, resize=self.resize_pattern)

    def train_trigger(self, image_px: int) -> Trigger:
        pattern, parts = self._pattern(image_px), self.pieces**2
        count = max(1, int(self.shown * parts + 0.5))

        def trigger(images: np.ndarray, index: np.ndarray) -> np.ndarray:
            shown = np.zeros((len(index), parts), dtype=bool)
            for i, sample in enumerate(index):
                shown[i, sample_rng(self.pattern_seed, int(sample)).choice(parts, size=count, replace=False)] = True
            return adap_blend(images, pattern, self.alpha, shown.reshape(-1, self.pieces, self.pieces))

        return trigger

    def test_trigger(self, image_px: int) -> Trigger:
        pattern = self._pattern(image_px)
        return lambda images, index: blended(images, pattern, self.test_alpha)
