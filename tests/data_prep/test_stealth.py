from __future__ import annotations

import math

import numpy as np
import pytest

from data_prep.stealth import compare, ssim, summarise


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004 in loops: an 11 x 11 window around every pixel, edges reflected."""
    reach = 5
    taps = [math.exp(-0.5 * (t / 1.5) ** 2) for t in range(-reach, reach + 1)]
    taps = [t / sum(taps) for t in taps]
    height, width, channels = a.shape

    def reflected(i: int, size: int) -> int:
        return -i - 1 if i < 0 else 2 * size - i - 1 if i >= size else i

    total = 0.0
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                mx = my = xx = yy = xy = 0.0
                for i, wy in enumerate(taps):
                    for j, wx in enumerate(taps):
                        row, col = reflected(y + i - reach, height), reflected(x + j - reach, width)
                        p, q, w = float(a[row, col, c]), float(b[row, col, c]), wy * wx
                        mx, my = mx + w * p, my + w * q
                        xx, yy, xy = xx + w * p * p, yy + w * q * q, xy + w * p * q
                c1, c2 = 2.55**2, 7.65**2
                total += (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / (
                    (mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2)
                )  # fmt: skip
    return total / (height * width * channels)


def test_ssim_is_the_formula(rng):
    a = rng.integers(0, 256, (12, 13, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    assert ssim(a, a) == pytest.approx(1.0)


def test_figures():
    clean = np.full((2, 12, 12, 3), 100, dtype=np.uint8)
    poisoned = clean.copy()
    poisoned[0] += 10
    poisoned[1, 0, 0, 0] += 30
    figures = summarise(compare(clean, poisoned))
    error = (100 + 900 / 432) / 2
    assert figures["images"] == 2
    assert figures["psnr_db"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert figures["linf_max"] == 30
    assert figures["linf_mean"] == 20
    assert summarise(compare(clean, clean)) == {
        "images": 2, "psnr_db": None, "ssim": 1.0, "linf_mean": 0.0, "linf_max": 0
    }  # fmt: skip
