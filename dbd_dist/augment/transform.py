"""Augmenting a batch of images with parameters that were drawn before."""

from __future__ import annotations

import torch
from torch import Tensor

from dbd_dist.augment.batched import affine, apply_batched, make_plan
from dbd_dist.augment.config import AugmentConfig
from dbd_dist.augment.params import Params


def apply(config: AugmentConfig, images_BCHW: Tensor, params: Params) -> Tensor:
    """Augment uint8 RGB images (B, 3, H, W); fastest on a view of (B, H, W, 3) storage, as the loaders give it.

    Returns new, normalised float32 images (B, 3, H, W) in channels_last memory format on the same device. The same
    parameters give the same images; on a GPU nothing waits for the device. Pixels stay floating point from the crop
    to the normalisation, where torchvision rounds to bytes after every operation.
    """
    images_BHWC = _channels_last(images_BCHW)
    expected = (len(params), params.height, params.width, 3)
    assert images_BHWC.shape == expected, f"parameters are for {expected}, images are {images_BHWC.shape}"
    plan = params.plan
    if plan is None or plan.sorted_B.device != images_BCHW.device:
        plan = make_plan(params, images_BCHW.device)
    return apply_batched(config, images_BHWC, plan).permute(0, 3, 1, 2)


def normalise(config: AugmentConfig, images_BCHW: Tensor) -> Tensor:
    """Only normalise uint8 images, for evaluation; the result is as that of `apply`."""
    images_BHWC = _channels_last(images_BCHW)
    gain_C11, offset_C11 = affine(config, images_BCHW.device)
    return torch.addcmul(offset_C11.view(3), images_BHWC.float(), gain_C11.view(3) / 255).permute(0, 3, 1, 2)


def _channels_last(images_BCHW: Tensor) -> Tensor:
    assert images_BCHW.dtype == torch.uint8, f"images are {images_BCHW.dtype}, not uint8"
    assert images_BCHW.ndim == 4, f"images have {images_BCHW.ndim} dimensions, not 4"
    assert images_BCHW.shape[1] == 3, f"images have {images_BCHW.shape[1]} channels, not 3"
    return images_BCHW.permute(0, 2, 3, 1).contiguous()
