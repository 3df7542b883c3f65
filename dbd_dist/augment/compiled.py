"""The augmentation on a CPU: one compiled pass over each image while it lies in the core's cache.

Numba comes with FFCV. The first use on a machine compiles for some seconds; the result is cached on disk. Images are
independent of each other, so the result depends neither on the batch nor on the number of threads.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dbd_dist.augment.config import AugmentConfig, blur_kernel_px
from dbd_dist.augment.params import Params

_BICUBIC, _BILINEAR, _REFLECT = range(3)
_EDGE = 2  # zeros on each side of a row: taps outside the box have no weight, but are read

# Sums may be reordered and multiply-adds fused, which vectorising needs; NaN and infinity keep their meaning.
_jit = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"}, cache=True)


def apply_compiled(config: AugmentConfig, images_BHWC: Tensor, params: Params) -> Tensor:
    """Augment uint8 images on the CPU; returns normalised float32 images (B, H, W, C)."""
    count, height, width, _ = images_BHWC.shape
    out_BHWC = torch.empty(images_BHWC.shape, dtype=torch.float32)
    if config.crop == "random_resized":
        source = _BICUBIC if config.interpolation == "bicubic" else _BILINEAR
    else:
        source = _REFLECT
    mean_C, std_C = np.array(config.mean), np.array(config.std)
    arguments = (
        images_BHWC.numpy(),
        out_BHWC.numpy(),
        source,
        params.box_B4.numpy(),
        params.flip_B.numpy(),
        params.jitter_B.numpy(),
        params.factor_B4.numpy(),
        params.order_B4.numpy(),
        params.grayscale_B.numpy(),
        params.blur_B.numpy(),
        params.sigma_B.numpy(),
        blur_kernel_px(height, width),
        (1 / std_C).astype(np.float32),
        (-mean_C / std_C).astype(np.float32),
    )
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        _augment(0, count, *arguments)
    else:
        cuts = [count * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: _augment(cuts[i], cuts[i + 1], *arguments), range(threads)))
    return out_BHWC


@_jit
def _augment(
    start, stop, images, out, source, box, flip, jitter, factor, order, grayscale, blur, sigma, kernel_px, gain, offset
):
    height, width = images.shape[1], images.shape[2]
    planes = np.empty((3, height * width), np.float32)
    blurred = np.empty(height * width, np.float32)
    row = np.zeros((width + 2 * _EDGE) * 3, np.float32)
    padded = np.empty(width + kernel_px - 1, np.float32)
    for n in range(start, stop):
        if source == _REFLECT:
            _shift(images[n], box[n], flip[n], planes)
        else:
            _resize(images[n], box[n], flip[n], source, row, planes)
        r, g, b = planes[0], planes[1], planes[2]
        if jitter[n]:
            for step in range(4):
                operation = order[n, step]
                amount = factor[n, operation]
                if operation == 0:
                    _scale(r, g, b, amount, np.float32(0))
                elif operation == 1:
                    _scale(r, g, b, amount, (np.float32(1) - amount) * _mean_gray(r, g, b))
                elif operation == 2:
                    _saturate(r, g, b, amount)
                else:
                    _shift_hue(r, g, b, amount)
        if grayscale[n]:
            _saturate(r, g, b, np.float32(0))
        if blur[n]:
            for c in range(3):
                _blur(planes[c], height, width, sigma[n], kernel_px, padded, blurred)
        _normalise(r, g, b, gain, offset, out[n].reshape(-1))


@_jit
def _mirror(i, size):
    """Pixel that reflection at the edges puts at position i, for -size < i < 2 * size - 1."""
    return (size - 1) - abs((size - 1) - abs(i))


@_jit
def _shift(image, box, flip, planes):
    height, width = image.shape[0], image.shape[1]
    scale = np.float32(1 / 255)
    for y in range(height):
        from_y = _mirror(box[0] + y, height)
        for x in range(width):
            from_x = _mirror(box[1] + (width - 1 - x if flip else x), width)
            for c in range(3):
                planes[c, y * width + x] = scale * image[from_y, from_x, c]


@_jit
def _taps(start, length, size, source):
    """First source pixel and four weights of each of `size` pixels that `length` pixels are stretched to."""
    first = np.empty(size, np.int64)
    weight = np.empty((size, 4), np.float32)
    for i in range(size):
        centre = (i + 0.5) * length / size
        first[i] = math.floor(centre - 0.5) - 1
        total = 0.0
        for k in range(4):
            pixel = first[i] + k
            d = abs(pixel + 0.5 - centre)
            w = 0.0
            if 0 <= pixel < length:
                if source == _BILINEAR:
                    w = max(0.0, 1 - d)
                elif d < 1:
                    w = (1.5 * d - 2.5) * d * d + 1
                elif d < 2:
                    w = ((-0.5 * d + 2.5) * d - 4) * d + 2
            weight[i, k] = w
            total += w
        for k in range(4):
            weight[i, k] /= total
    return first, weight


@_jit
def _resize(image, box, flip, source, row, planes):
    top, left, h, w = box[0], box[1], box[2], box[3]
    height, width = image.shape[0], image.shape[1]
    first_y, weight_y = _taps(top, h, height, source)
    first_x, weight_x = _taps(left, w, width, source)
    zero, one, scale = np.float32(0), np.float32(1), np.float32(1 / 255)
    row[(_EDGE + w) * 3 :] = 0
    inner = row[_EDGE * 3 : (_EDGE + w) * 3]
    for y in range(height):
        y0 = first_y[y]
        s0 = image[top + max(y0, 0), left : left + w].reshape(-1)
        s1 = image[top + min(max(y0 + 1, 0), h - 1), left : left + w].reshape(-1)
        s2 = image[top + min(y0 + 2, h - 1), left : left + w].reshape(-1)
        s3 = image[top + min(y0 + 3, h - 1), left : left + w].reshape(-1)
        a0, a1, a2, a3 = weight_y[y, 0] * scale, weight_y[y, 1] * scale, weight_y[y, 2] * scale, weight_y[y, 3] * scale
        for j in range(3 * w):
            inner[j] = a0 * s0[j] + a1 * s1[j] + a2 * s2[j] + a3 * s3[j]
        for x in range(width):
            at = (first_x[x] + _EDGE) * 3
            b0, b1, b2, b3 = weight_x[x, 0], weight_x[x, 1], weight_x[x, 2], weight_x[x, 3]
            to = y * width + (width - 1 - x if flip else x)
            for c in range(3):
                v = b0 * row[at + c] + b1 * row[at + 3 + c] + b2 * row[at + 6 + c] + b3 * row[at + 9 + c]
                planes[c, to] = min(max(v, zero), one)


@_jit
def _gray(r, g, b):
    return np.float32(0.2989) * r + np.float32(0.587) * g + np.float32(0.114) * b


@_jit
def _unit(v):
    return min(max(v, np.float32(0)), np.float32(1))


@_jit
def _scale(r, g, b, f, c):
    for i in range(r.size):
        r[i] = _unit(f * r[i] + c)
        g[i] = _unit(f * g[i] + c)
        b[i] = _unit(f * b[i] + c)


@_jit
def _mean_gray(r, g, b):
    total = np.float32(0)
    for i in range(r.size):
        total += _gray(r[i], g[i], b[i])
    return total / np.float32(r.size)


@_jit
def _saturate(r, g, b, f):
    for i in range(r.size):
        rest = (np.float32(1) - f) * _gray(r[i], g[i], b[i])
        r[i] = _unit(f * r[i] + rest)
        g[i] = _unit(f * g[i] + rest)
        b[i] = _unit(f * b[i] + rest)


@_jit
def _shift_hue(red, green, blue, turns):
    shift = np.float32(6) * turns
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        highest, lowest = max(r, max(g, b)), min(r, min(g, b))
        chroma = highest - lowest
        difference = g - b if r == highest else (b - r if g == highest else r - g)
        sector = np.float32(0) if r == highest else (np.float32(2) if g == highest else np.float32(4))
        h = difference / max(chroma, np.float32(1e-12)) + sector + shift
        h -= np.float32(6) * math.floor(h * np.float32(1 / 6))
        red[i] = lowest + chroma * _unit(abs(h - np.float32(3)) - np.float32(1))
        green[i] = lowest + chroma * _unit(np.float32(2) - abs(h - np.float32(2)))
        blue[i] = lowest + chroma * _unit(np.float32(2) - abs(h - np.float32(4)))


@_jit
def _blur(plane, height, width, sigma, kernel_px, padded, out):
    half = kernel_px // 2
    weight = np.empty(kernel_px, np.float32)
    total = 0.0
    for k in range(kernel_px):
        total += math.exp(-0.5 * ((k - half) / sigma) ** 2)
    for k in range(kernel_px):
        weight[k] = math.exp(-0.5 * ((k - half) / sigma) ** 2) / total
    for y in range(height):
        row = plane[y * width : (y + 1) * width]
        to = out[y * width : (y + 1) * width]
        padded[half : half + width] = row
        for k in range(half):
            padded[k] = row[half - k]
            padded[half + width + k] = row[width - 2 - k]
        for x in range(width):
            to[x] = weight[0] * padded[x]
        for k in range(1, kernel_px):
            for x in range(width):
                to[x] += weight[k] * padded[x + k]
    for y in range(height):
        to = plane[y * width : (y + 1) * width]
        to[:] = 0
        for k in range(kernel_px):
            at = _mirror(y + k - half, height) * width
            row = out[at : at + width]
            for x in range(width):
                to[x] += weight[k] * row[x]


@_jit
def _normalise(r, g, b, gain, offset, out):
    for i in range(r.size):
        out[3 * i] = gain[0] * r[i] + offset[0]
        out[3 * i + 1] = gain[1] * g[i] + offset[1]
        out[3 * i + 2] = gain[2] * b[i] + offset[2]
