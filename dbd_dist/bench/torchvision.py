"""The reference that other projects use: torchvision's transforms, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig

_PADDING = {"reflect": "reflect", "zeros": "constant"}


def pillow(config: AugmentConfig, size: int) -> Callable[[Any], torch.Tensor]:
    """From a Pillow image to the normalised tensor, as image folders are usually augmented."""
    steps: list = [*_crop_and_flip(v1, config, size), *_colours(v1, config, size)]
    return v1.Compose([*steps, v1.ToTensor(), v1.Normalize(config.mean, config.std)])


def tensor(config: AugmentConfig, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same on uint8 tensors."""
    steps: list = [*_crop_and_flip(v2, config, size), *_colours(v2, config, size)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])


def _crop_and_flip(t: Any, config: AugmentConfig, size: int) -> list:
    mode = InterpolationMode(config.interpolation)
    if config.crop == "pad":
        crop = t.RandomCrop(size, padding=config.pad_px, padding_mode=_PADDING[config.padding])
    else:
        crop = t.RandomResizedCrop(size, scale=config.scale, ratio=config.ratio, interpolation=mode)
    return [crop, t.RandomHorizontalFlip(config.flip_p)]


def _colours(t: Any, config: AugmentConfig, size: int) -> list:
    steps = []
    if config.jitter_p:
        steps.append(t.RandomApply([t.ColorJitter(*config.jitter)], p=config.jitter_p))
    if config.grayscale_p:
        steps.append(t.RandomGrayscale(p=config.grayscale_p))
    if config.blur_p:
        blur = t.GaussianBlur(augment.blur_kernel_px(config, size, size), sigma=config.blur_sigma)
        steps.append(t.RandomApply([blur], p=config.blur_p))
    return steps
