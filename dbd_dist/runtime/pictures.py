"""Triggers that a method found, as one picture."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

MOST = 40
"""Classes that are shown."""
_TILE_PX, _TEXT_PX, _GAP_PX, _COLUMNS = 96, 16, 6, 10


def trigger_sheet(triggers_K4HW: Tensor, scores_K: Tensor, flagged: Collection[int]) -> Image.Image:
    """For every class its mask (white: replaced) and, below, the pattern where the mask lets it through; the most
    suspect classes first, flagged ones framed and marked with a star.

    Args:
        triggers_K4HW: mask, then pattern, in 0-1.
        scores_K: anomaly index of each class, written below its number.
    """
    order = scores_K.argsort(descending=True, stable=True)[:MOST].tolist()
    columns = min(len(order), _COLUMNS)
    wide, high = _TILE_PX + _GAP_PX, 2 * (_TILE_PX + _TEXT_PX) + _GAP_PX
    sheet = Image.new("RGB", (columns * wide + _GAP_PX, -(-len(order) // columns) * high + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for place, label in enumerate(order):
        x, y = _GAP_PX + place % columns * wide, _GAP_PX + place // columns * high
        mask, pattern = triggers_K4HW[label, :1], triggers_K4HW[label, 1:]
        draw.text((x, y), f"class {label}{' *' if label in flagged else ''}", fill="black")
        draw.text((x, y + _TEXT_PX // 2 + 4), f"index {scores_K[label]:.2f}", fill="black")
        top = y + 2 * _TEXT_PX - 4
        for tile in (_tile(mask.expand(3, -1, -1)), _tile(mask * pattern)):
            sheet.paste(tile, (x, top))
            if label in flagged:
                draw.rectangle((x - 3, top - 1, x + _TILE_PX + 2, top + _TILE_PX), outline="crimson", width=3)
            top += _TILE_PX + _GAP_PX // 2
    return sheet


def _tile(image_3HW: Tensor) -> Image.Image:
    pixels = (image_3HW.clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).resize((_TILE_PX, _TILE_PX), Image.Resampling.NEAREST)
