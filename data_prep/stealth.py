"""How visible a poison is: PSNR, SSIM and the largest change between clean and poisoned images."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

_MAX_PIXELS = 1 << 22
_SIGMA, _TRUNCATE = 1.5, 3.5  # an 11 x 11 window, as in the paper on SSIM


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004, doi 10.1109/TIP.2003.819861, eq. 13): Gaussian window of 11 px with
    sigma 1.5, K1 0.01, K2 0.03, population moments, the mean over all pixels (edges reflected) and channels.

    Args:
        first, second: uint8 (H, W, 3).
    """
    x, y = first.astype(np.float64), second.astype(np.float64)

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, (_SIGMA, _SIGMA, 0), truncate=_TRUNCATE)

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(ratio.mean())


def sample_size(image_px: int) -> int:
    """How many pairs are measured: 256 small ones, fewer large ones, which take some 15 ms each."""
    return max(16, min(256, _MAX_PIXELS // image_px**2))


def compare(clean: np.ndarray, poisoned: np.ndarray) -> list[tuple[float, float, int]]:
    """Of each pair of images uint8 (b, H, W, 3): mean squared error, SSIM, largest change in grey levels."""
    rows = []
    for before, after in zip(clean, poisoned, strict=True):
        difference = before.astype(np.float64) - after
        rows.append((float(np.square(difference).mean()), ssim(before, after), int(np.abs(difference).max())))
    return rows


def summarise(rows: list[tuple[float, float, int]]) -> dict[str, float | int | None]:
    """What the manifest says of the pairs that `compare` saw.

    Returns:
        images: how many; psnr_db: of the mean squared error over all of them, None where nothing changed; ssim: mean;
        linf_mean, linf_max: mean and largest over the images of the largest change, grey levels.
    """
    errors, similarities, largest = (np.array(column) for column in zip(*rows, strict=True))
    error = float(errors.mean())
    return {
        "images": len(rows),
        "psnr_db": round(10 * float(np.log10(255**2 / error)), 3) if error else None,
        "ssim": round(float(similarities.mean()), 5),
        "linf_mean": round(float(largest.mean()), 3),
        "linf_max": int(largest.max()),
    }
