"""Settings of a random augmentation, and those that the method uses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from data_prep.errors import UserError

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RGB = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Crop, flip, colour jitter, grayscale, blur and normalise an image, which keeps its size.

    The operations come in this order and mean what the torchvision transforms of the same names mean. The
    defaults are SimCLR's (Chen et al. 2020, arXiv 2002.05709) with the strengths of the DBD release
    (Huang et al. 2022, arXiv 2202.03423).
    """

    crop: Literal["random_resized", "pad", "none"] = "random_resized"
    """Random box resized to the full image, random shift of the padded image, or no crop."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random_resized crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random_resized crop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter that resizes a random_resized crop."""
    pad_px: int = 4
    """Pixels that a pad crop adds to each side, before it cuts a box of the image's size."""
    padding: Literal["reflect", "zeros"] = field(default="reflect", metadata={"omit_default": True})
    """What a pad crop adds: the image reflected at its edges, or black."""
    flip_p: float = 0.5
    """Probability of a left-right flip."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    """Strength s of the random brightness, contrast and saturation (factors from 1 - s to 1 + s) and hue (a
    shift of up to s turns of the colour circle either way, at most 0.5), applied in random order."""
    jitter_p: float = 0.8
    """Probability of the colour jitter."""
    grayscale_p: float = 0.2
    """Probability of dropping colour."""
    blur_p: float = 0.5
    """Probability of a Gaussian blur."""
    blur_kernel: Literal["simclr", "full"] = field(default="simclr", metadata={"omit_default": True})
    """How far the blur reaches. simclr: its kernel spans a tenth of the image, 3 px of 32, which cuts a wide Gaussian
    off. full: three times the largest blur_sigma to each side, as good as unbounded."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    mean: RGB = CIFAR_MEAN
    """Mean of red, green and blue that is subtracted, for pixels in 0-1."""
    std: RGB = CIFAR_STD
    """Standard deviation that the channels are divided by, for pixels in 0-1."""

    def __post_init__(self):
        _one_of("crop", self.crop, ("random_resized", "pad", "none"))
        _one_of("interpolation", self.interpolation, ("bicubic", "bilinear"))
        _one_of("padding", self.padding, ("reflect", "zeros"))
        _one_of("blur_kernel", self.blur_kernel, ("simclr", "full"))
        _interval("scale", self.scale, highest=1.0)
        _interval("ratio", self.ratio)
        _interval("blur_sigma", self.blur_sigma)
        if self.pad_px < 0:
            raise UserError(f"pad_px is {self.pad_px}", where="augment", expected="0 or more pixels")
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p"):
            p = getattr(self, name)
            if not 0 <= p <= 1:
                raise UserError(f"{name} is {p}", where="augment", expected="a probability, 0 to 1")
        if len(self.jitter) != 4 or any(not 0 <= s < math.inf for s in self.jitter) or self.jitter[3] > 0.5:
            raise UserError(
                f"jitter is {self.jitter}",
                where="augment",
                expected="brightness, contrast, saturation, hue: four numbers from 0 up, hue at most 0.5",
            )
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise UserError(f"mean is {self.mean}", where="augment", expected="three numbers, one a channel")
        if len(self.std) != 3 or any(not 0 < s < math.inf for s in self.std):
            raise UserError(f"std is {self.std}", where="augment", expected="three numbers above 0, one a channel")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}", where="augment", expected=", ".join(allowed))


def _interval(name: str, value: tuple[float, float], highest: float = math.inf) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] <= highest or not math.isfinite(value[1]):
        limit = "" if highest == math.inf else f" and at most {highest}"
        raise UserError(f"{name} is {value}", where="augment", expected=f"two numbers above 0{limit}, smaller first")


def blur_kernel_px(config: AugmentConfig, height: int, width: int) -> int:
    """Size of the square blur kernel, an odd number of 3 or more.

    simclr: the odd number nearest to a tenth of the shorter side, 3 px for images of 32 px and 23 px for 224 px, as
    SimCLR has them. full: three times the largest sigma to each side (13 px for 2.0), as far as the image reaches.
    """
    shorter = min(height, width)
    if config.blur_kernel == "simclr":
        return max(3, 2 * math.floor(0.1 * shorter / 2) + 1)
    return 2 * max(1, min(math.ceil(3 * config.blur_sigma[1]), shorter - 2)) + 1


def simclr(*, mean: RGB = CIFAR_MEAN, std: RGB = CIFAR_STD, blur_p: float = 0.5) -> AugmentConfig:
    """SimCLR's augmentation, for the self-supervised stage."""
    return AugmentConfig(mean=mean, std=std, blur_p=blur_p)


def weak_pad(*, mean: RGB = CIFAR_MEAN, std: RGB = CIFAR_STD) -> AugmentConfig:
    """Random shift by up to 4 px (reflected edges) and flip, for supervised stages on small images."""
    return AugmentConfig(crop="pad", jitter_p=0, grayscale_p=0, blur_p=0, mean=mean, std=std)


def weak_resized(*, mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD) -> AugmentConfig:
    """Random resized crop (area 0.2-1, bilinear) and flip, for supervised stages on large images."""
    return AugmentConfig(interpolation="bilinear", jitter_p=0, grayscale_p=0, blur_p=0, mean=mean, std=std)


def none(*, mean: RGB = CIFAR_MEAN, std: RGB = CIFAR_STD) -> AugmentConfig:
    """Only the normalisation."""
    return AugmentConfig(crop="none", flip_p=0, jitter_p=0, grayscale_p=0, blur_p=0, mean=mean, std=std)
