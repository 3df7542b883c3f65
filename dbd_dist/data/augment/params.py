"""The random numbers of an augmentation: drawn for a whole global batch, before any image is touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist.data.augment.config import AugmentConfig

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many boxes that do not fit


@dataclass(frozen=True, kw_only=True, eq=False)
class Params:
    """How each of B images is augmented. The tensors lie on the CPU, where work is planned without a sync.

    `params[i:j]` and `params[index_tensor]` keep some of the images: each rank its own part of the global
    batch.
    """

    height: int
    """Height of the images, in pixels."""
    width: int
    """Width of the images, in pixels."""
    box_B4: Tensor
    """Top, left, height, width of the crop in pixels (int64); a pad crop may start at -pad_px."""
    flip_B: Tensor
    """Whether to flip left-right (bool)."""
    jitter_B: Tensor
    """Whether to jitter the colours (bool)."""
    factor_B4: Tensor
    """Brightness, contrast and saturation factors and the hue shift in turns (float32)."""
    order_B4: Tensor
    """The jitter operations in their order (int64): 0 brightness, 1 contrast, 2 saturation, 3 hue."""
    grayscale_B: Tensor
    """Whether to drop colour (bool)."""
    blur_B: Tensor
    """Whether to blur (bool)."""
    sigma_B: Tensor
    """Standard deviation of the blur in pixels (float32)."""

    def __len__(self) -> int:
        return len(self.flip_B)

    def __getitem__(self, keep: slice | Tensor) -> Params:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        kept = {name: v[keep] for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **kept)


def join(parts: Sequence[Params]) -> Params:
    """The parameters of several batches of one image size, one after the other."""
    tensors = [f.name for f in fields(Params) if isinstance(getattr(parts[0], f.name), Tensor)]
    return replace(parts[0], **{n: torch.cat([getattr(part, n) for part in parts]) for n in tensors})


def draw(config: AugmentConfig, count: int, *, height: int, width: int, generator: torch.Generator) -> Params:
    """Draw the parameters of `count` images of `height` x `width` px from a CPU generator.

    Every rank draws those of the whole global batch and keeps its slice, so that no image's augmentation
    depends on the number of ranks. As many numbers are drawn for every image, whatever they decide.
    """

    if config.crop == "pad" and config.pad_px >= min(height, width):
        raise UserError(
            f"pad_px is {config.pad_px} for images of {height} x {width} pixels",
            where="augment",
            expected=f"at most {min(height, width) - 1}, since reflection takes as many pixels from inside",
        )
    if config.blur_p > 0 and min(height, width) < 2:
        raise UserError(
            f"images of {height} x {width} pixels cannot be blurred", where="augment", hint="set blur_p to 0"
        )

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    if config.crop == "random_resized":
        box_B4 = _resized_boxes(config, uniform(2 * _TRIES + 2), height, width)
    elif config.crop == "pad":
        shift_B2 = (uniform(2) * (2 * config.pad_px + 1)).long() - config.pad_px
        box_B4 = torch.cat([shift_B2, torch.tensor([[height, width]]).expand(count, 2)], dim=1)
    else:
        box_B4 = torch.tensor([[0, 0, height, width]]).repeat(count, 1)

    u_B4 = uniform(4)  # one coin for each of flip, jitter, grayscale, blur
    p_4 = torch.tensor([config.flip_p, config.jitter_p, config.grayscale_p, config.blur_p])
    flip_B, jitter_B, grayscale_B, blur_B = (u_B4 < p_4).unbind(1)

    strength_4 = torch.tensor(config.jitter, dtype=torch.float64)
    lowest_4 = torch.cat([(1 - strength_4[:3]).clamp(min=0), -strength_4[3:]])
    highest_4 = torch.cat([1 + strength_4[:3], strength_4[3:]])
    low, high = config.blur_sigma
    return Params(
        height=height,
        width=width,
        box_B4=box_B4,
        flip_B=flip_B.contiguous(),
        jitter_B=jitter_B.contiguous(),
        factor_B4=(lowest_4 + uniform(4) * (highest_4 - lowest_4)).float(),
        order_B4=uniform(4).argsort(dim=1),
        grayscale_B=grayscale_B.contiguous(),
        blur_B=blur_B.contiguous(),
        sigma_B=(low + uniform() * (high - low)).float(),
    )


def _resized_boxes(config: AugmentConfig, u_BN: Tensor, height: int, width: int) -> Tensor:
    """The first of ten candidate boxes that fits into the image, else the largest allowed in its middle."""
    area_BT = height * width * (config.scale[0] + u_BN[:, :_TRIES] * (config.scale[1] - config.scale[0]))
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio_BT = torch.exp(low + u_BN[:, _TRIES : 2 * _TRIES] * (high - low))
    w_BT = torch.round(torch.sqrt(area_BT * ratio_BT)).long()
    h_BT = torch.round(torch.sqrt(area_BT / ratio_BT)).long()
    fits_BT = (w_BT > 0) & (w_BT <= width) & (h_BT > 0) & (h_BT <= height)
    first_B1 = fits_BT.to(torch.uint8).argmax(dim=1, keepdim=True)
    any_B = fits_BT.any(dim=1)

    if width / height < config.ratio[0]:
        fallback_w, fallback_h = width, max(1, round(width / config.ratio[0]))
    elif width / height > config.ratio[1]:
        fallback_w, fallback_h = max(1, round(height * config.ratio[1])), height
    else:
        fallback_w, fallback_h = width, height
    h_B = torch.where(any_B, h_BT.gather(1, first_B1)[:, 0], fallback_h)
    w_B = torch.where(any_B, w_BT.gather(1, first_B1)[:, 0], fallback_w)
    top_B = torch.where(any_B, (u_BN[:, -2] * (height - h_B + 1)).long(), (height - fallback_h) // 2)
    left_B = torch.where(any_B, (u_BN[:, -1] * (width - w_B + 1)).long(), (width - fallback_w) // 2)
    return torch.stack([top_B, left_B, h_B, w_B], dim=1)
