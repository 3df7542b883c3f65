"""What ShrinkPad does to images at test time: made smaller, and padded back at a random place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.fields import require
from dbd_dist.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Shrink(Stage):
    """Shrink every image by some pixels and pad it with black, at random places (Li et al. 2021, arXiv 2104.02361)."""

    name: ClassVar[str] = "shrink"
    title: ClassVar[str] = "Shrinking and padding at test time"
    gives: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False

    px: int | None = None
    """Pixels by which the sides shrink. Default: an eighth of the image, which is the usual 4 of 32."""
    draws: int = 10
    """Places that an image is padded to; the class probabilities are their mean. A place holds for all images, so that
    the answer for one does not depend on which others are asked about."""
    seed: int = 0
    """Of the places."""

    def __post_init__(self):
        require(self, self.name, px=">= 1", draws=">= 1", seed=">= 0")

    def check_image_px(self, image_px: int) -> None:
        if self.px is not None and self.px >= image_px:
            raise UserError(
                f"images of {image_px} px cannot shrink by {self.px} px",
                where=f"{self.name}.px",
                expected=f"1 to {image_px - 1}",
            )

    def offers(self) -> dict[str, Any]:
        return {}


class ShrunkAndPadded(nn.Module):
    """A classifier that is asked about each image at several places.

    Args:
        mean, std: by which images were normalised, so that the padding is black.
    """

    def __init__(self, model: nn.Module, config: Shrink, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model, self.config = model, config
        self.black = [-m / s for m, s in zip(mean, std)]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logarithms of the mean class probabilities (B, K)."""
        side = images_BCHW.shape[-1]
        px = self.config.px if self.config.px is not None else max(side // 8, 1)
        small = F.interpolate(images_BCHW.float(), size=(side - px, side - px), mode="bilinear", antialias=True)
        small = small.to(images_BCHW.dtype)
        places = torch.randint(px + 1, (self.config.draws, 2), generator=seeds.generator(self.config.seed, "shrink"))
        black = torch.tensor(self.black, device=images_BCHW.device, dtype=images_BCHW.dtype)
        total = torch.zeros((), device=images_BCHW.device)
        for top, left in places.tolist():
            padded = black[:, None, None].expand_as(images_BCHW).clone(memory_format=torch.channels_last)
            padded[:, :, top : top + side - px, left : left + side - px] = small
            total = total + self.model(padded).float().softmax(dim=1)
        return (total / self.config.draws).log()
