"""CTRL (Li et al., ICCV 2023, "An embarrassingly simple backdoor attack on self-supervised learning"): a wave of two
frequencies in the colours, on images of the target class, aimed at the self-supervised stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from data_prep.attacks.attack import Attack, Trigger
from data_prep.errors import UserError

_RGB_OF_U = np.array([0.0, -0.396, 2.029])
_RGB_OF_V = np.array([1.14, -0.581, 0.0])


def ctrl_wave(image_px: int, window: int, bands: tuple[int, ...], magnitude: float) -> np.ndarray:
    """What the trigger adds (Li et al. 2023, arXiv 2210.07346, sec. 4.2).

    The image is cut into windows from the upper left, each taken to YUV and to the orthonormal DCT-II; there the
    magnitude is added to coefficient (k, k) of U and of V for every band k. All of these steps are linear, so the sum
    of the images of those coefficients is added to the pixels. Where the side is no multiple of the window, the last
    windows are cut off.

    Returns:
        float64 (image_px, image_px, 3), in grey levels.
    """
    at = np.pi * (np.arange(image_px) % window + 0.5) / window
    wave = np.zeros((image_px, image_px))
    for k in bands:
        basis = np.cos(at * k) * np.sqrt((2 if k else 1) / window)
        wave += magnitude * np.outer(basis, basis)
    return wave[:, :, None] * (_RGB_OF_U + _RGB_OF_V)


def ctrl(images: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Add a wave, clipped to 0-255 and rounded to the nearest grey level, halves up.

    Args:
        images: uint8 (B, H, H, 3).
        wave: float (H, H, 3), as from `ctrl_wave`.

    Returns:
        uint8 (B, H, H, 3), a new array.
    """
    added = np.floor(wave + 0.5).astype(np.int16)  # pixels are whole numbers, so the sum rounds as the wave does
    return np.clip(images.astype(np.int16) + added, 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Ctrl(Attack):
    """A wave of two frequencies in the colours, on images of the target class that keep their label (Li et al. 2023).

    An attack on self-supervised pretraining: the wave survives its augmentation. The paper poisons 1 % (rate 0.01)."""

    name: ClassVar[str] = "ctrl"
    clean_label: ClassVar[bool] = True

    magnitude: float = 50.0
    """What is added to each coefficient of the transform of training images, above 0 and up to 1000."""
    test_magnitude: float = 100.0
    """The same for test images; the authors attack with more than they train with."""
    window: int = 32
    """Side of the squares that are transformed, in pixels."""
    bands: tuple[int, ...] = (15, 31)
    """Frequencies, each along rows and columns alike: whole numbers from 0, below window."""

    def __post_init__(self):
        for field in ("magnitude", "test_magnitude"):
            value = getattr(self, field)
            if not 0 < value <= 1000:
                raise UserError(f"magnitude {value} is out of range", where=field, expected="above 0 and at most 1000")
        if self.window < 2:
            raise UserError(f"a window of {self.window} px", where="window", expected="2 or more")
        if not self.bands or not set(self.bands) <= set(range(self.window)) or len(set(self.bands)) < len(self.bands):
            raise UserError(
                f"the bands are {', '.join(map(str, self.bands)) or 'none'}",
                where="bands",
                expected=f"different whole numbers from 0 to {self.window - 1}",
            )

    def train_trigger(self, image_px: int) -> Trigger:
        if self.window > image_px:
            raise UserError(
                f"a window of {self.window} px does not fit images of {image_px} px",
                where="window",
                expected=f"at most {image_px}, with bands below it (half of it and one less, as 15 and 31 are of 32)",
            )
        wave = ctrl_wave(image_px, self.window, self.bands, self.magnitude)
        return lambda images, index: ctrl(images, wave)

    def test_trigger(self, image_px: int) -> Trigger:
        return replace(self, magnitude=self.test_magnitude).train_trigger(image_px)
