"""Backdoor triggers: what the attacker does to images and labels.

An attack is a frozen config that answers four questions: which samples it may poison (`eligible`), which
label they are given (`relabel`), and what is done to the pixels of training and of test images
(`train_trigger`, `test_trigger`). The pixels are changed by one pure function an attack, uint8 in, uint8 out.
A new attack is one more function and one more config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from data_prep.errors import UserError
from data_prep.images import read_opaque_image

Trigger = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 (B, H, W, 3), int64 (B,) sample indices) -> uint8 (B, H, W, 3), a new array."""

Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right"]


def badnets(images: np.ndarray, patch: np.ndarray, row: int, col: int) -> np.ndarray:
    """Stamp an opaque patch (Gu et al. 2019, arXiv 1708.06733).

    Args:
        images: uint8 (B, H, W, 3).
        patch: uint8 (h, w, 3).
        row: of the patch's upper edge.
        col: of the patch's left edge.

    Returns:
        uint8 (B, H, W, 3), a copy.
    """
    height, width = patch.shape[:2]
    assert 0 <= row <= images.shape[1] - height
    assert 0 <= col <= images.shape[2] - width
    stamped = images.copy()
    stamped[:, row : row + height, col : col + width] = patch
    return stamped


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


def checkerboard(patch_px: int) -> np.ndarray:
    """A 3 x 3 black and white checkerboard with white corners, scaled to uint8 (patch_px, patch_px, 3)."""
    cell = np.arange(patch_px) * 3 // patch_px
    white = (cell[:, None] + cell[None, :]) % 2 == 0
    return np.repeat(np.where(white, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An all-to-one attack: poisoned samples of every other class are given the target label."""

    name: ClassVar[str]
    """Names the attack in folders, manifests and on the command line."""

    def eligible(self, labels: np.ndarray, target: int) -> np.ndarray:
        """Which samples may be poisoned: bool (n,) for int (n,) true labels."""
        return labels != target

    def relabel(self, labels: np.ndarray, target: int, num_classes: int) -> np.ndarray:
        """The labels that poisoned samples are given: int (n,) for int (n,) true labels in 0 to num_classes -
        1."""
        return np.full_like(labels, target)

    def train_trigger(self, image_px: int) -> Trigger:
        """What is done to poisoned training images of image_px x image_px."""
        raise AssertionError(f"{type(self).__name__} poisons nothing")

    def test_trigger(self, image_px: int) -> Trigger:
        """What is done to test images; that of training unless an attack says otherwise."""
        return self.train_trigger(image_px)

    def describe(self) -> dict[str, Any]:
        """The config as JSON values; a trigger image is told by its content too, so that an edited one is
        another attack."""
        described: dict[str, Any] = {"kind": self.name}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                described[f"{field.name}_sha256"] = hashlib.sha256(_bytes(value)).hexdigest()
                value = value.name
            described[field.name] = value
        return described


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """No poison: the images and labels as they are."""

    name: ClassVar[str] = "clean"


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """A small opaque patch in a fixed place (Gu et al. 2019)."""

    name: ClassVar[str] = "badnets"

    patch_px: int | None = None
    """Side of the patch; without it 3 px for images up to 32 px and 3/32 of the image above (21 px of 224).
    """
    pattern: Literal["checkerboard", "white"] | Path = "checkerboard"
    """What the patch shows: a name, or an opaque image file, which is resized to the patch."""
    corner: Corner = "bottom-right"
    """The corner of the image that the patch sits in, unless row and col place it."""
    margin_px: int | None = None
    """Distance of the patch from the image's edges; without it 1 px for images up to 32 px and 1/32 of the
    image above."""
    row: int | None = None
    """Row of the patch's upper edge; goes with col and overrides corner and margin-px."""
    col: int | None = None
    """Column of the patch's left edge; goes with row."""

    def __post_init__(self):
        if self.patch_px is not None and self.patch_px < 1:
            raise UserError(f"the patch has {self.patch_px} pixels", where="patch_px", allowed="1 or more")
        if self.margin_px is not None and self.margin_px < 0:
            raise UserError(f"margin {self.margin_px} lies outside the image", where="margin_px", allowed="0 or more")
        if (self.row is None) != (self.col is None):
            raise UserError("only one of row and col is given", where="row, col", allowed="both or neither")

    def patch(self, image_px: int) -> tuple[np.ndarray, int, int]:
        """The patch, uint8 (h, h, 3), and the row and column of its upper left corner.

        Raises:
            UserError: it does not fit into the image; its image file is unreadable or has an alpha channel.
        """
        side = self.patch_px if self.patch_px is not None else max(3, round(3 * image_px / 32))
        margin = self.margin_px if self.margin_px is not None else max(1, image_px // 32)
        if side > image_px:
            raise UserError(
                f"a patch of {side} px is larger than the image of {image_px} px",
                where="patch_px",
                allowed=f"1 to {image_px}",
            )
        if self.row is not None and self.col is not None:
            row, col = self.row, self.col
        else:
            far = image_px - side - margin
            row = margin if self.corner.startswith("top") else far
            col = margin if self.corner.endswith("left") else far
        if not (0 <= row <= image_px - side and 0 <= col <= image_px - side):
            raise UserError(
                f"a patch of {side} px at row {row}, column {col} sticks out of the image of {image_px} px",
                where="row, col, margin_px",
                allowed=f"rows and columns 0 to {image_px - side}",
            )
        if self.pattern == "checkerboard":
            return checkerboard(side), row, col
        if self.pattern == "white":
            return np.full((side, side, 3), 255, dtype=np.uint8), row, col
        return _resized(Path(self.pattern), side), row, col

    def train_trigger(self, image_px: int) -> Trigger:
        patch, row, col = self.patch(image_px)
        return lambda images, index: badnets(images, patch, row, col)


@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """A pattern over the whole image, mixed in weakly (Chen et al. 2017)."""

    name: ClassVar[str] = "blended"

    alpha: float = 0.1
    """Share of the pattern in the mixture, above 0 and at most 1."""
    pattern: Literal["noise"] | Path = "noise"
    """What is mixed in: uniform random noise, or an opaque image file, which is resized to the images."""
    pattern_seed: int = 0
    """Seed of the noise."""

    def __post_init__(self):
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha {self.alpha} is out of range", where="alpha", allowed="above 0 and at most 1")
        if Fraction(repr(float(self.alpha))).denominator > 10**6:
            raise UserError(f"alpha {self.alpha} is too fine", where="alpha", allowed="at most six decimals")
        if self.pattern_seed < 0:
            raise UserError(f"seed {self.pattern_seed} is negative", where="pattern_seed", allowed="0 or more")

    def pattern_image(self, image_px: int) -> np.ndarray:
        """The pattern, uint8 (image_px, image_px, 3).

        Raises:
            UserError: its image file is unreadable or has an alpha channel.
        """
        if self.pattern == "noise":
            rng = np.random.default_rng(self.pattern_seed)
            return rng.integers(0, 256, size=(image_px, image_px, 3), dtype=np.uint8)
        return _resized(Path(self.pattern), image_px)

    def train_trigger(self, image_px: int) -> Trigger:
        pattern = self.pattern_image(image_px)
        return lambda images, index: blended(images, pattern, self.alpha)


def _resized(path: Path, side: int) -> np.ndarray:
    image = read_opaque_image(path)
    return np.array(image.resize((side, side), Image.Resampling.BILINEAR), dtype=np.uint8)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the trigger image ({error.strerror})", where=path) from error
