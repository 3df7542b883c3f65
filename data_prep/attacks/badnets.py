"""BadNets (Gu et al. 2019): a small opaque patch in a fixed place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from data_prep.attacks.attack import PoisonLabel, Trigger, trigger_image
from data_prep.errors import UserError

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


def checkerboard(patch_px: int) -> np.ndarray:
    """A 3 x 3 black and white checkerboard with white corners, scaled to uint8 (patch_px, patch_px, 3)."""
    cell = np.arange(patch_px) * 3 // patch_px
    white = (cell[:, None] + cell[None, :]) % 2 == 0
    return np.repeat(np.where(white, 255, 0).astype(np.uint8)[:, :, None], 3, axis=2)


def default_patch_px(image_px: int) -> int:
    """Side of a patch: 3 px for images up to 32 px, the same share of larger ones (21 px of 224)."""
    return max(3, round(3 * image_px / 32))


@dataclass(frozen=True, kw_only=True)
class BadNets(PoisonLabel):
    """A small opaque patch in a fixed place (Gu et al. 2019)."""

    name: ClassVar[str] = "badnets"

    patch_px: int | None = None
    """Side of the patch; without it that of the pattern's file, or 3 px for images up to 32 px and 3/32 of the image
    above (21 px of 224)."""
    pattern: Literal["checkerboard", "white"] | Path = "checkerboard"
    """What the patch shows: a name, or a square opaque image file, which is resized where patch-px is given."""
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
            raise UserError(f"the patch has {self.patch_px} pixels", where="patch_px", expected="1 or more")
        if self.margin_px is not None and self.margin_px < 0:
            raise UserError(f"margin {self.margin_px} lies outside the image", where="margin_px", expected="0 or more")
        if (self.row is None) != (self.col is None):
            raise UserError("only one of row and col is given", where="row, col", expected="both or neither")

    def patch(self, image_px: int) -> tuple[np.ndarray, int, int]:
        """The patch, uint8 (h, h, 3), and the row and column of its upper left corner.

        Raises:
            UserError: it does not fit into the image; its image file is unreadable or has an alpha channel.
        """
        picture = None
        if isinstance(self.pattern, Path):
            picture = trigger_image(self.pattern, self.patch_px, resize=True, hint="crop it, or give patch_px")
        side = len(picture) if picture is not None else self.patch_px or default_patch_px(image_px)
        margin = self.margin_px if self.margin_px is not None else max(1, image_px // 32)
        if side > image_px:
            raise UserError(
                f"a patch of {side} px is larger than the image of {image_px} px",
                where="patch_px",
                expected=f"1 to {image_px}",
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
                expected=f"rows and columns 0 to {image_px - side}",
            )
        if picture is not None:
            return picture, row, col
        if self.pattern == "checkerboard":
            return checkerboard(side), row, col
        return np.full((side, side, 3), 255, dtype=np.uint8), row, col

    def train_trigger(self, image_px: int) -> Trigger:
        patch, row, col = self.patch(image_px)
        return lambda images, index: badnets(images, patch, row, col)
