"""The trigger that the adaptive attack optimises: a pattern, and its share at each pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.craft.config import AdaptiveConfig


class Trigger(nn.Module):
    """Pattern and mask behind logits, so that an optimiser without bounds keeps both in 0-1."""

    def __init__(self, config: AdaptiveConfig, px: int):
        super().__init__()
        self._budget = config.mask_budget
        noise = torch.rand(3, px, px, generator=seeds.generator(config.seed, "adaptive", "pattern"))
        self.pattern = nn.Parameter(torch.logit(0.05 + 0.9 * noise))
        self.fixed: Tensor | None
        if config.optimise == "pattern":
            self.register_buffer("fixed", fixed_mask(config, px), persistent=False)
        else:
            self.register_buffer("fixed", None)
            level = torch.full((px, px), config.mask_budget)
            self.mask = nn.Parameter(torch.logit(level.clamp_max(0.95)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The pattern (3, H, W) and the mask (H, W), both in 0-1; an optimised mask's mean is within its budget."""
        if self.fixed is not None:
            return self.pattern.sigmoid(), self.fixed
        mask = self.mask.sigmoid()
        return self.pattern.sigmoid(), mask * (self._budget / mask.mean()).clamp_max(1)

    @torch.no_grad()
    def quantised(self) -> tuple[Tensor, Tensor]:
        """The same in 1/255, uint8; an optimised mask is rounded down, to stay within its budget."""
        pattern, mask = self()
        level = (mask * 255).round() if self.fixed is not None else (mask * 255).floor()
        return (pattern * 255).round().to(torch.uint8), level.to(torch.uint8)


def fixed_mask(config: AdaptiveConfig, px: int) -> Tensor:
    """A share of the pattern over the whole image, or over a square in a corner: (px, px).

    Raises:
        UserError: the square is larger than the image.
    """
    side = config.patch_px if config.patch_px is not None else px
    if side > px:
        raise UserError(
            f"a patch of {side} px is larger than the images of {px} px", where="craft.patch_px", expected=f"1 to {px}"
        )
    mask = torch.zeros(px, px)
    rows = slice(0, side) if config.corner.startswith("top") else slice(px - side, px)
    columns = slice(0, side) if config.corner.endswith("left") else slice(px - side, px)
    mask[rows, columns] = config.share
    return mask


def stamp(grey_BCHW: Tensor, pattern_CHW: Tensor, mask_HW: Tensor) -> Tensor:
    """x' = (1 - m) x + m p, of images in grey levels and a trigger in 0-1; differentiable."""
    return grey_BCHW + mask_HW * (pattern_CHW * 255 - grey_BCHW)


def stamp_quantised(images_BCHW: Tensor, pattern_CHW: Tensor, mask_HW: Tensor) -> Tensor:
    """The same with all of it in uint8, rounded to the nearest grey level, halves up."""
    share = mask_HW.to(torch.int32)
    mixed = (255 - share) * images_BCHW.to(torch.int32) + share * pattern_CHW.to(torch.int32)
    return ((2 * mixed + 255) // 510).to(torch.uint8)
