"""SIG (Barni et al. 2019): a horizontal sinusoid over the whole image, labels untouched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from data_prep.attacks.attack import Attack, Trigger
from data_prep.errors import UserError


def sig(images: np.ndarray, delta: float, frequency: float) -> np.ndarray:
    """Add delta sin(2 pi j f / W) to column j (Barni et al. 2019, arXiv 1902.11237, eq. 1), clipped to 0-255 and
    rounded to the nearest grey level, halves up.

    Args:
        images: uint8 (B, H, W, 3).
        delta: amplitude in grey levels.
        frequency: periods over the width.

    Returns:
        uint8 (B, H, W, 3), a new array.
    """
    width = images.shape[2]
    wave = delta * np.sin(2 * np.pi * np.arange(width) * frequency / width)
    added = np.floor(wave + 0.5).astype(np.int16)  # pixels are whole numbers, so the sum rounds as the wave does
    return np.clip(images.astype(np.int16) + added[:, None], 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Sig(Attack):
    """A sinusoid over the whole image, on images of the target class that keep their label (Barni et al. 2019)."""

    name: ClassVar[str] = "sig"
    clean_label: ClassVar[bool] = True

    delta: float = 20.0
    """Amplitude in grey levels, above 0 and up to 127."""
    frequency: float = 6.0
    """Periods over the width of the image."""
    test_delta: float | None = None
    """Amplitude on test images; without it delta. The paper attacks with more than it trains with."""

    def __post_init__(self):
        for field in ("delta", "test_delta"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 127:
                raise UserError(f"amplitude {value} is out of range", where=field, expected="above 0 and at most 127")
        if not 0 < self.frequency < float("inf"):
            raise UserError(f"frequency {self.frequency} is out of range", where="frequency", expected="above 0")

    def train_trigger(self, image_px: int) -> Trigger:
        if self.frequency > image_px / 2:
            raise UserError(
                f"{self.frequency:g} periods do not fit {image_px} columns",
                where="frequency",
                expected=f"at most {image_px / 2:g} for images of {image_px} px",
            )
        return lambda images, index: sig(images, self.delta, self.frequency)

    def test_trigger(self, image_px: int) -> Trigger:
        if self.test_delta is None:
            return self.train_trigger(image_px)
        return replace(self, delta=self.test_delta, test_delta=None).train_trigger(image_px)
