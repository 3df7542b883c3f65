"""Blended (Chen et al. 2017): a pattern over the whole image, mixed in weakly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_prep.attacks.attack import PoisonLabel, Trigger, check_seed, trigger_image
from data_prep.attacks.protocols import ProtocolName
from data_prep.errors import UserError

_ALPHA: dict[ProtocolName, float] = {"paper": 0.1, "released": 0.1, "ten-percent": 0.2}


def blended(images: np.ndarray, pattern: np.ndarray, alpha: float) -> np.ndarray:
    """Mix a full-size pattern in: (1 - alpha) x + alpha p (Chen et al. 2017, arXiv 1712.05526).

    Computed in integers from alpha's decimal digits and rounded to the nearest grey level, halves up, so that
    every machine makes the same bytes: in binary floating point 0.9 x + 0.1 p would land on either side of
    its many exact halves.

    Args:
        images: uint8 (B, H, W, 3).
        pattern: uint8 (H, W, 3).
        alpha: the pattern's share, in (0, 1], at most six decimals.

    Returns:
        uint8 (B, H, W, 3), a new array.
    """
    share = Fraction(repr(float(alpha)))
    part, whole = share.numerator, share.denominator
    offset = pattern.astype(np.uint32) * np.uint32(2 * part) + np.uint32(whole)
    mixed = images.astype(np.uint32)
    mixed *= np.uint32(2 * (whole - part))
    mixed += offset
    mixed //= np.uint32(2 * whole)
    return mixed.astype(np.uint8)


def check_alpha(alpha: float, where: str) -> None:
    """Raises:
    UserError: outside (0, 1], or with more decimals than `blended` computes with.
    """
    if not 0 < alpha <= 1:
        raise UserError(f"alpha {alpha} is out of range", where=where, expected="above 0 and at most 1")
    if Fraction(repr(float(alpha))).denominator > 10**6:
        raise UserError(f"alpha {alpha} is too fine", where=where, expected="at most six decimals")


@dataclass(frozen=True, kw_only=True)
class Blended(PoisonLabel):
    """A pattern over the whole image, mixed in weakly (Chen et al. 2017)."""

    name: ClassVar[str] = "blended"

    alpha: float | None = None
    """Share of the pattern in the mixture, above 0 and at most 1; without it the protocol's (0.1, ten-percent 0.2)."""
    test_alpha: float | None = None
    """The same for test images; without it alpha."""
    pattern: Literal["noise"] | Path = "noise"
    """What is mixed in: uniform random noise, or an opaque image file of the images' size."""
    resize_pattern: bool = False
    """Resize a pattern of another size (bilinear)."""
    pattern_seed: int = 0
    """Seed of the noise."""

    def __post_init__(self):
        for field in ("alpha", "test_alpha"):
            if getattr(self, field) is not None:
                check_alpha(getattr(self, field), field)
        check_seed(self.pattern_seed, "pattern_seed")

    def with_protocol(self, protocol: ProtocolName) -> Blended:
        return self if self.alpha is not None else replace(self, alpha=_ALPHA[protocol])

    def pattern_image(self, image_px: int) -> np.ndarray:
        """The pattern, uint8 (image_px, image_px, 3).

        Raises:
            UserError: its image file is unreadable, has an alpha channel or another size.
        """
        return full_pattern(self.pattern, self.pattern_seed, image_px, resize=self.resize_pattern)

    def train_trigger(self, image_px: int) -> Trigger:
        pattern = self.pattern_image(image_px)
        alpha = self.alpha if self.alpha is not None else _ALPHA["paper"]
        return lambda images, index: blended(images, pattern, alpha)

    def test_trigger(self, image_px: int) -> Trigger:
        if self.test_alpha is None:
            return self.train_trigger(image_px)
        return replace(self, alpha=self.test_alpha).train_trigger(image_px)


def full_pattern(pattern: str | Path, seed: int, image_px: int, *, resize: bool) -> np.ndarray:
    """Noise, or an image file: uint8 (image_px, image_px, 3).

    Raises:
        UserError: the image file is unreadable, has an alpha channel, or is of another size and not to be resized.
    """
    if pattern == "noise":
        return np.random.default_rng(seed).integers(0, 256, size=(image_px, image_px, 3), dtype=np.uint8)
    return trigger_image(Path(pattern), image_px, resize=resize, hint="resize it, or give resize_pattern")
