"""Random augmentation of image batches on the device that trains: draw the parameters, then apply them."""

from dbd_dist.data.augment.config import (
    CIFAR_MEAN,
    CIFAR_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    blur_kernel_px,
    none,
    simclr,
    weak_pad,
    weak_resized,
)
from dbd_dist.data.augment.params import Params, draw, join
from dbd_dist.data.augment.transform import apply, normalise

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AugmentConfig",
    "Params",
    "apply",
    "blur_kernel_px",
    "draw",
    "join",
    "none",
    "normalise",
    "simclr",
    "weak_pad",
    "weak_resized",
]
