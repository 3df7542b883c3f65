"""Bilinear sampling of images in integers, compiled. Import this module where it is needed: it loads Numba."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import njit

BITS = 11
"""Of a weight in one direction: both together and a pixel fit 32 bits."""
ONE = 1 << BITS


def _jit(function: Callable) -> Callable:
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither this folder nor the user's cache is writable: compile in every process
        return njit(nogil=True)(function)


@_jit
def sample(images, row, column, weight_y, weight_x, out):
    """Take every pixel from between four others, rounded to the nearest level.

    Args:
        images: uint8 (B, H, W, 3), C-contiguous.
        row, column: int64 (H, W), the upper left of the four; at most H - 2 and W - 2.
        weight_y, weight_x: int64 (H, W), 0 to `ONE`, of the lower and of the right ones.
        out: uint8 (B, H, W, 3), written.
    """
    one = np.int64(ONE)
    half = np.int64(1) << np.int64(2 * BITS - 1)
    count, height, width = images.shape[0], images.shape[1], images.shape[2]
    for n in range(count):
        for y in range(height):
            for x in range(width):
                r, c = np.uintp(row[y, x]), np.uintp(column[y, x])
                wy, wx = weight_y[y, x], weight_x[y, x]
                a, b = (one - wy) * (one - wx), (one - wy) * wx
                d, e = wy * (one - wx), wy * wx
                r1, c1 = r + np.uintp(1), c + np.uintp(1)
                for k in range(3):
                    total = (
                        a * images[n, r, c, k]
                        + b * images[n, r, c1, k]
                        + d * images[n, r1, c, k]
                        + e * images[n, r1, c1, k]
                    )
                    out[n, y, x, k] = (total + half) >> np.int64(2 * BITS)
