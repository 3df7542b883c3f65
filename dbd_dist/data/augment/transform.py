"""Augmenting a batch of images with parameters that were drawn before."""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from dbd_dist.data.augment.batched import apply_batched, make_plan, normalise_batched
from dbd_dist.data.augment.config import AugmentConfig
from dbd_dist.data.augment.params import Params


def apply(config: AugmentConfig, images_BCHW: Tensor, params: Params) -> Tensor:
    """Augment uint8 RGB images (B, 3, H, W); fastest on a view of (B, H, W, 3) storage, as loaders give it.

    Returns new, normalised float32 images (B, 3, H, W) in channels_last memory format on the same device.
    The same parameters give the same image, whatever the rest of the batch; on a GPU nothing waits for the
    device. Pixels stay floating point from the crop to the normalisation, clamped to 0-1 where torchvision
    clamps, but never rounded to bytes in between.
    """
    images_BHWC = _channels_last(images_BCHW)
    expected = (len(params), params.height, params.width, 3)
    assert images_BHWC.shape == expected, f"parameters are for {expected}, images are {images_BHWC.shape}"
    device = images_BCHW.device
    if device.type == "cpu" and _has_numba():
        from dbd_dist.data.augment.compiled import apply_compiled  # loads a compiler, for nothing beside a GPU

        return apply_compiled(config, images_BHWC, params).permute(0, 3, 1, 2)
    return apply_batched(config, images_BHWC, make_plan(params, device)).permute(0, 3, 1, 2)


@functools.cache
def _has_numba() -> bool:
    """Numba comes with FFCV; without it, or with one that refuses the NumPy beside it, a CPU runs what other devices
    run, to the same results."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def normalise(config: AugmentConfig, images_BCHW: Tensor) -> Tensor:
    """Only normalise uint8 images, for evaluation; the result is as that of `apply`."""
    return normalise_batched(config, _channels_last(images_BCHW)).permute(0, 3, 1, 2)


def _channels_last(images_BCHW: Tensor) -> Tensor:
    assert images_BCHW.dtype == torch.uint8, f"images are {images_BCHW.dtype}, not uint8"
    assert images_BCHW.ndim == 4, f"images have {images_BCHW.ndim} dimensions, not 4"
    assert images_BCHW.shape[1] == 3, f"images have {images_BCHW.shape[1]} channels, not 3"
    return images_BCHW.permute(0, 2, 3, 1).contiguous()
