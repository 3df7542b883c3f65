"""preview.png: a few images before, after the trigger, and the difference made visible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_GAP_PX = 4


def write_preview(path: Path, before: np.ndarray, after: np.ndarray) -> None:
    """Three rows of images: before, after, and their absolute difference, amplified until its largest value
    is white.

    Args:
        path: of the PNG.
        before: uint8 (n, H, W, 3).
        after: uint8 (n, H, W, 3).
    """
    difference = np.abs(after.astype(np.int16) - before).astype(np.float64)
    amplified = np.round(difference * (255 / max(1.0, difference.max()))).astype(np.uint8)
    count, height, width = before.shape[:3]
    scale = max(1, 96 // height)
    cell_h, cell_w = height * scale + _GAP_PX, width * scale + _GAP_PX
    sheet = np.full((3 * cell_h + _GAP_PX, count * cell_w + _GAP_PX, 3), 255, dtype=np.uint8)
    for row, images in enumerate((before, after, amplified)):
        for column, image in enumerate(images):
            top, left = _GAP_PX + row * cell_h, _GAP_PX + column * cell_w
            enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[top : top + height * scale, left : left + width * scale] = enlarged
    Image.fromarray(sheet).save(path, format="PNG")
