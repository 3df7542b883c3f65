"""The augmentation on a CPU: one compiled pass over each image while it lies in the core's cache.

Numba comes with FFCV. The first use on a machine compiles for some seconds, and the result is cached on disk.
Images are independent of each other, so the result depends neither on the batch nor on the number of threads.

Two things keep these loops in vector registers: every literal and byte is made float32 by hand, since Numba
computes uint8 * float32 in double precision; and slices or unsigned numbers index what is read at computed
places, since Numba checks signed ones for counting from the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dbd_dist.data.augment.config import AugmentConfig, blur_kernel_px
from dbd_dist.data.augment.params import Params

_BICUBIC, _BILINEAR, _REFLECT, _ZEROS = range(4)
_1, _2, _3, _4, _5, _6, _7, _8, _9, _10, _11 = (np.uintp(i) for i in range(1, 12))
_THREAD_PIXELS = 1 << 15  # fewer pixels than this, about 0.3 ms of work, are not worth a thread
_EDGE = 2  # zeros on each side of a row: taps outside the box have no weight, but are read


def _jit(function: Callable) -> Callable:
    # Vectorising the means needs reordered sums. These flags leave NaN and infinity their meaning.
    options: dict = {
        "nogil": True,
        "error_model": "numpy",
        "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    }
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache is writable: compile in every process
        return njit(**options)(function)


def apply_compiled(config: AugmentConfig, images_BHWC: Tensor, params: Params) -> Tensor:
    """Augment uint8 images on the CPU; returns normalised float32 images (B, H, W, C)."""
    count, height, width, _ = images_BHWC.shape
    out_BHWC = torch.empty(images_BHWC.shape, dtype=torch.float32)
    if config.crop == "random_resized":
        source = _BICUBIC if config.interpolation == "bicubic" else _BILINEAR
    else:
        source = _REFLECT if config.padding == "reflect" else _ZEROS
    mean_C, std_C = np.array(config.mean), np.array(config.std)
    arguments = (
        images_BHWC.numpy(),
        out_BHWC.numpy(),
        source,
        # Contiguous, since Numba compiles again for every kind of memory layout.
        params.box_B4.contiguous().numpy(),
        params.flip_B.contiguous().numpy(),
        params.jitter_B.contiguous().numpy(),
        params.factor_B4.contiguous().numpy(),
        params.order_B4.contiguous().numpy(),
        params.grayscale_B.contiguous().numpy(),
        params.blur_B.contiguous().numpy(),
        params.sigma_B.contiguous().numpy(),
        blur_kernel_px(config, height, width),
        (1 / std_C).astype(np.float32),
        (-mean_C / std_C).astype(np.float32),
    )
    threads = min(torch.get_num_threads(), max(1, count * height * width // _THREAD_PIXELS))
    if threads <= 1:
        _augment(0, count, *arguments)
    else:
        cuts = [count * i // threads for i in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: _augment(cuts[i], cuts[i + 1], *arguments), range(threads)))
    return out_BHWC


@_jit
def _augment(
    start,
    stop,
    images,
    out,
    source,
    box,
    flip,
    jitter,
    factor,
    order,
    grayscale,
    blur,
    sigma,
    kernel_px,
    gain,
    offset,
):
    height, width = images.shape[1], images.shape[2]
    planes = np.empty((3, height * width), np.float32)
    r, g, b = planes[0], planes[1], planes[2]
    blurred = np.empty(height * width, np.float32)
    row = np.zeros((width + 2 * _EDGE) * 3, np.float32)
    padded = np.empty(width + kernel_px + 1, np.float32)
    weight = np.empty(kernel_px // 2 + 2, np.float32)
    for n in range(start, stop):
        if source in (_REFLECT, _ZEROS):
            _shift(images[n], box[n], flip[n], source == _REFLECT, r, g, b)
        else:
            _resize(images[n], box[n], flip[n], source, row, r, g, b)
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
            reach = _gaussian(sigma[n], kernel_px // 2, weight)
            for c in range(3):
                _blur(planes[c], height, width, weight, reach, padded, blurred)
        _normalise(r, g, b, gain, offset, out[n].reshape(-1))


@_jit
def _mirror(i, size):
    """Pixel that reflection at the edges puts at position i, for -size < i < 2 * size - 1."""
    return (size - 1) - abs((size - 1) - abs(i))


@_jit
def _shift(image, box, flip, reflect, red, green, blue):
    """Planes of the image shifted by the box's top and left, with pixels in 0-1; beyond the edges it is reflected, or
    black."""
    height, width = image.shape[0], image.shape[1]
    flat = image.reshape(-1)
    scale = np.float32(1 / 255)
    top, left = box[0], box[1]
    first, last = max(0, -left), width - max(0, left)  # columns that come from inside the image
    n = last - first
    for y in range(height):
        if not reflect and not 0 <= top + y < height:
            red[y * width : (y + 1) * width] = 0
            green[y * width : (y + 1) * width] = 0
            blue[y * width : (y + 1) * width] = 0
            continue
        start = _mirror(top + y, height) * width
        source = flat[3 * (start + left + first) : 3 * (start + left + last)]
        at = y * width + (width - last if flip else first)
        r, g, b = red[at : at + n], green[at : at + n], blue[at : at + n]
        if flip:
            for x in range(n):
                to = np.uintp(n - 1 - x)
                r[to] = scale * np.float32(source[3 * x])
                g[to] = scale * np.float32(source[3 * x + 1])
                b[to] = scale * np.float32(source[3 * x + 2])
        else:
            for x in range(n):
                r[x] = scale * np.float32(source[3 * x])
                g[x] = scale * np.float32(source[3 * x + 1])
                b[x] = scale * np.float32(source[3 * x + 2])
        for i in range(width - n):
            x = i if i < first else last + i - first
            i3 = 3 * (start + _mirror(left + x, width))
            to = y * width + (width - 1 - x if flip else x)
            if not reflect:
                red[to], green[to], blue[to] = 0, 0, 0
                continue
            red[to] = scale * np.float32(flat[i3])
            green[to] = scale * np.float32(flat[i3 + 1])
            blue[to] = scale * np.float32(flat[i3 + 2])


@_jit
def _taps(length, size, source):
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
def _resize(image, box, flip, source, row, red, green, blue):
    top, left, h, w = box[0], box[1], box[2], box[3]
    height, width = image.shape[0], image.shape[1]
    first_y, weight_y = _taps(h, height, source)
    weight_y *= np.float32(1 / 255)
    first_x, weight_x = _taps(w, width, source)
    at_x = ((first_x + _EDGE) * 3).astype(np.uintp)
    if flip:
        at_x, weight_x = at_x[::-1].copy(), weight_x[::-1].copy()
    n = 3 * w
    inner = row[_EDGE * 3 : _EDGE * 3 + n]
    row[_EDGE * 3 + n :] = 0
    flat = image.reshape(-1)
    for y in range(height):
        y0 = first_y[y]
        o0 = ((top + max(y0, 0)) * width + left) * 3
        o1 = ((top + min(max(y0 + 1, 0), h - 1)) * width + left) * 3
        o2 = ((top + min(y0 + 2, h - 1)) * width + left) * 3
        o3 = ((top + min(y0 + 3, h - 1)) * width + left) * 3
        s0, s1, s2, s3 = flat[o0 : o0 + n], flat[o1 : o1 + n], flat[o2 : o2 + n], flat[o3 : o3 + n]
        a0, a1, a2, a3 = weight_y[y, 0], weight_y[y, 1], weight_y[y, 2], weight_y[y, 3]
        for j in range(n):
            inner[j] = a0 * np.float32(s0[j]) + a1 * np.float32(s1[j]) + a2 * np.float32(s2[j]) + a3 * np.float32(s3[j])
        for x in range(width):
            b0, b1, b2, b3 = weight_x[x, 0], weight_x[x, 1], weight_x[x, 2], weight_x[x, 3]
            i = at_x[x]
            r = b0 * row[i] + b1 * row[i + _3] + b2 * row[i + _6] + b3 * row[i + _9]
            g = b0 * row[i + _1] + b1 * row[i + _4] + b2 * row[i + _7] + b3 * row[i + _10]
            b = b0 * row[i + _2] + b1 * row[i + _5] + b2 * row[i + _8] + b3 * row[i + _11]
            to = y * width + x
            red[to], green[to], blue[to] = _unit(r), _unit(g), _unit(b)


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
    """Summed in parts of 64 x 64 pixels: one float32 sum over 224 x 224 was off by up to 0.002 grey levels."""
    total = np.float32(0)
    for start in range(0, r.size, 4096):
        part = slice(start, min(start + 4096, r.size))
        total += _sum_gray(r[part], g[part], b[part])
    return total / np.float32(r.size)


@_jit
def _sum_gray(r, g, b):
    total = np.float32(0)
    for i in range(r.size):
        total += _gray(r[i], g[i], b[i])
    return total


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
        h -= np.float32(6) * np.floor(h * np.float32(1 / 6))
        red[i] = lowest + chroma * _unit(abs(h - np.float32(3)) - np.float32(1))
        green[i] = lowest + chroma * _unit(np.float32(2) - abs(h - np.float32(2)))
        blue[i] = lowest + chroma * _unit(np.float32(2) - abs(h - np.float32(4)))


@_jit
def _gaussian(sigma, half, weight):
    """Fill in the weights of the taps 0 to half; return the last that is not lost in rounding."""
    total = 1.0
    for t in range(1, half + 1):
        total += 2 * math.exp(-0.5 * (t / sigma) ** 2)
    reach = 1
    weight[:] = 0
    for t in range(half + 1):
        weight[t] = math.exp(-0.5 * (t / sigma) ** 2) / total
        if weight[t] > 1e-8:
            reach = max(reach, t)
    return reach


@_jit
def _blur(plane, height, width, weight, reach, padded, out):
    """Blur along rows into `out`, along columns back; four taps a loop, as memory is slower than adding."""
    w0, w1 = weight[0], weight[1]
    margin = reach + 1
    centre = padded[margin : margin + width]
    left, right = padded[margin - 1 : margin - 1 + width], padded[margin + 1 : margin + 1 + width]
    for y in range(height):
        row = plane[y * width : (y + 1) * width]
        to = out[y * width : (y + 1) * width]
        padded[margin : margin + width] = row
        for t in range(1, margin + 1):
            padded[margin - t] = row[_mirror(-t, width)]
            padded[margin + width - 1 + t] = row[_mirror(width - 1 + t, width)]
        for x in range(width):
            to[x] = w0 * centre[x] + w1 * (left[x] + right[x])
        for t in range(2, reach + 1, 2):
            _add_pairs(
                to,
                weight[t],
                padded[margin - t : margin - t + width],
                padded[margin + t : margin + t + width],
                weight[t + 1],
                padded[margin - t - 1 : margin - t - 1 + width],
                padded[margin + t + 1 : margin + t + 1 + width],
            )
    for y in range(height):
        to = plane[y * width : (y + 1) * width]
        here = out[y * width : (y + 1) * width]
        up, down = _row(out, y - 1, height, width), _row(out, y + 1, height, width)
        for x in range(width):
            to[x] = w0 * here[x] + w1 * (up[x] + down[x])
        for t in range(2, reach + 1, 2):
            _add_pairs(
                to,
                weight[t],
                _row(out, y - t, height, width),
                _row(out, y + t, height, width),
                weight[t + 1],
                _row(out, y - t - 1, height, width),
                _row(out, y + t + 1, height, width),
            )


@_jit
def _row(plane, y, height, width):
    at = _mirror(y, height) * width
    return plane[at : at + width]


@_jit
def _add_pairs(to, w, a, b, v, c, d):
    for x in range(to.size):
        to[x] += w * (a[x] + b[x]) + v * (c[x] + d[x])


@_jit
def _normalise(r, g, b, gain, offset, out):
    for i in range(r.size):
        out[3 * i] = gain[0] * r[i] + offset[0]
        out[3 * i + 1] = gain[1] * g[i] + offset[1]
        out[3 * i + 2] = gain[2] * b[i] + offset[2]
