"""Attacks that a trained model was needed for: what `dbd craft` made is applied here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.artefacts import Artefact, read_artefact
from data_prep.attacks.attack import Attack, PoisonLabel, Trigger
from data_prep.attacks.badnets import badnets, checkerboard, default_patch_px
from data_prep.errors import UserError


def label_consistent(images: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Stamp a patch into all four corners (Turner et al. 2019, arXiv 1912.02771, sec. 5.2).

    Args:
        images: uint8 (B, H, W, 3); in training, the perturbed ones.
        patch: uint8 (h, h, 3), as it is in the upper left; mirrored in the others.

    Returns:
        uint8 (B, H, W, 3), a copy.
    """
    height, width = images.shape[1] - len(patch), images.shape[2] - len(patch)
    for row, turned in ((0, patch), (height, patch[::-1])):
        for col, stamp in ((0, turned), (width, turned[:, ::-1])):
            images = badnets(images, stamp, row, col)
    return images


def adaptive(images: np.ndarray, pattern: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mix a pattern in, at each pixel with a share of its own: (1 - m) x + m p, rounded to the nearest grey level,
    halves up (Huang et al., ICLR 2022, arXiv 2202.03423, sec. 5.4).

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
class _Crafted(Attack):
    crafted: ClassVar[bool] = True

    artefact: Path
    """Folder that `dbd craft` wrote, for this very set of images."""

    def read(self) -> Artefact:
        """The artefact.

        Raises:
            UserError: there is none, it is damaged, or it is for another attack.
        """
        return read_artefact(self.artefact, self.name)

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
        artefact = self.read()
        if artefact.image_px != image_px:
            raise UserError(f"made for images of {artefact.image_px} px, these have {image_px} px", where=self.artefact)
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

    def _sha256(self, path: Path) -> str:
        return self.read().sha256

    def _arrays(self, image_px: int) -> dict[str, np.ndarray]:
        artefact = self.read()
        if artefact.image_px != image_px:
            raise UserError(f"made for images of {artefact.image_px} px, these have {image_px} px", where=self.artefact)
        return dict(artefact.arrays)


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(_Crafted):
    """Images of the target class, made hard to recognise by an adversarial perturbation and stamped in all corners;
    labels stay (Turner et al. 2019). Test images are stamped only."""

    name: ClassVar[str] = "label-consistent"
    clean_label: ClassVar[bool] = True

    patch_px: int | None = None
    """Side of each of the four patches; without it 3 px for images up to 32 px and 3/32 of the image above."""

    def __post_init__(self):
        if self.patch_px is not None and self.patch_px < 1:
            raise UserError(f"the patch has {self.patch_px} pixels", where="patch_px", expected="1 or more")

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

    def _patch(self, image_px: int) -> np.ndarray:
        side = self.patch_px if self.patch_px is not None else default_patch_px(image_px)
        if 2 * side > image_px:
            raise UserError(
                f"four patches of {side} px do not fit an image of {image_px} px",
                where="patch_px",
                expected=f"1 to {image_px // 2}",
            )
        return checkerboard(side)

    def train_trigger(self, image_px: int) -> Trigger:
        arrays, patch = self._arrays(image_px), self._patch(image_px)

        def trigger(images: np.ndarray, index: np.ndarray) -> np.ndarray:
            return label_consistent(arrays["images"][np.searchsorted(arrays["index"], index)], patch)

        return trigger

    def test_trigger(self, image_px: int) -> Trigger:
        patch = self._patch(image_px)
        return lambda images, index: label_consistent(images, patch)


@dataclass(frozen=True, kw_only=True)
class Adaptive(_Crafted, PoisonLabel):
    """A pattern optimised by an attacker who knows DBD: poisoned images are to cluster in the feature space of a
    self-supervised network too (Huang et al. 2022, sec. 5.4)."""

    name: ClassVar[str] = "adaptive"

    def train_trigger(self, image_px: int) -> Trigger:
        arrays = self._arrays(image_px)
        pattern, mask = np.array(arrays["pattern"]), np.array(arrays["mask"])
        return lambda images, index: adaptive(images, pattern, mask)
