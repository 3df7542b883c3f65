"""Attacks that need a trained model: what `dbd craft` wrote is applied here.

Two kinds: training images perturbed one by one, and a pattern that was optimised for all images. An attack derives from
one of them, or from `Crafted` with arrays and triggers of its own, and is defined beside the code that crafts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.artefacts import PATTERN_AND_MASK, PERTURBED_IMAGES, Artefact, Layout, read_artefact
from data_prep.attacks.attack import Attack, PoisonLabel, Trigger
from data_prep.errors import UserError


def mix(images: np.ndarray, pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mix a pattern in, at each pixel with a share of its own: (1 - m) x + m p, rounded to the nearest grey level,
    halves up.

    Args:
        images: uint8 (B, H, W, 3).
        pattern: uint8 (H, W, 3).
        mask: uint8 (H, W): m in 1/255.

    Returns:
        uint8 (B, H, W, 3), a new array.
    """
    share = mask.astype(np.uint32)[:, :, None]
    return ((images * (2 * (255 - share)) + (pattern * (2 * share) + 255)) // 510).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Crafted(Attack):
    """An attack that applies an artefact of `dbd craft`."""

    crafted: ClassVar[bool] = True
    layout: ClassVar[Layout | None] = None
    """Of the artefact's arrays; None checks none."""

    artefact: Path
    """Folder that `dbd craft` wrote, for this very set of images."""

    def read(self) -> Artefact:
        """The artefact.

        Raises:
            UserError: there is none, it is damaged, or it is for another attack.
        """
        return read_artefact(self.artefact, self.name, self.layout)

    def check(self, *, image_px: int, fingerprint: str, target: int, poisoned: np.ndarray) -> None:
        """Refuse an artefact that was made for other images or another target.

        Args:
            image_px: of the images to be poisoned.
            fingerprint: of their training set, see `data_prep.artefacts.fingerprint`.
            target: label that the attack aims at.
            poisoned: bool (n,), the samples chosen.

        Raises:
            UserError
        """
        artefact = self._read_for(image_px)
        if artefact.fingerprint != fingerprint:
            raise UserError(
                f"made for another data set: fingerprint {artefact.fingerprint[:12]}, this one has {fingerprint[:12]}",
                where=self.artefact,
                expected="an artefact for these very training images, in this order",
                hint="make one with dbd craft on this data set",
            )
        if self.has_target and artefact.target != target:
            raise UserError(
                f"made for target {artefact.target}, not {target}", where="target", expected=str(artefact.target)
            )

    def arrays(self, image_px: int) -> dict[str, np.ndarray]:
        """What the artefact holds for images of that size."""
        return dict(self._read_for(image_px).arrays)

    def _read_for(self, image_px: int) -> Artefact:
        artefact = self.read()
        if artefact.image_px != image_px:
            raise UserError(f"made for images of {artefact.image_px} px, these have {image_px} px", where=self.artefact)
        return artefact

    def _sha256(self, path: Path) -> str:
        return self.read().sha256


@dataclass(frozen=True, kw_only=True)
class PerturbedImages(Crafted):
    """Perturbed training images of the target class, whose labels stay, and a visible trigger on top of them; test
    images carry that trigger alone."""

    layout: ClassVar[Layout | None] = PERTURBED_IMAGES
    clean_label: ClassVar[bool] = True

    def stamp(self, image_px: int) -> Callable[[np.ndarray], np.ndarray]:
        """The visible trigger: uint8 (B, H, W, 3) -> uint8 (B, H, W, 3). An attack without one leaves images as they
        are, and says in `test_trigger` what is done to test images."""
        return np.copy

    def check(self, *, image_px: int, fingerprint: str, target: int, poisoned: np.ndarray) -> None:
        super().check(image_px=image_px, fingerprint=fingerprint, target=target, poisoned=poisoned)
        artefact = self.read()
        missing = np.setdiff1d(np.flatnonzero(poisoned), artefact.arrays["index"])
        if len(missing):
            made = ", ".join(
                f"{name} {artefact.settings[name]}" for name in ("rate", "seed") if name in artefact.settings
            )
            raise UserError(
                f"{len(missing)} of {int(poisoned.sum())} chosen images have no perturbation in the artefact",
                where=self.artefact,
                expected=f"the rate and seed that it was made with ({made})",
            )

    def train_trigger(self, image_px: int) -> Trigger:
        arrays, stamp = self.arrays(image_px), self.stamp(image_px)
        return lambda images, index: stamp(arrays["images"][np.searchsorted(arrays["index"], index)])

    def test_trigger(self, image_px: int) -> Trigger:
        stamp = self.stamp(image_px)
        return lambda images, index: stamp(images)


@dataclass(frozen=True, kw_only=True)
class OptimisedPattern(Crafted, PoisonLabel):
    """An optimised pattern, mixed into images by a mask."""

    layout: ClassVar[Layout | None] = PATTERN_AND_MASK

    def train_trigger(self, image_px: int) -> Trigger:
        arrays = self.arrays(image_px)
        pattern, mask = np.array(arrays["pattern"]), np.array(arrays["mask"])
        return lambda images, index: mix(images, pattern, mask)
