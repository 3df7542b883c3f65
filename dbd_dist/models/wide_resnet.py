"""Wide residual networks (Zagoruyko and Komodakis 2016, arXiv 1605.07146)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dbd_dist.models.preact_resnet import PreActNetwork


@dataclass(frozen=True, kw_only=True)
class WideResNet28x2:
    """WRN-28-2, the usual network of semi-supervised learning on CIFAR: 1.47 M parameters with a head for 10 classes.

    Like the paper's: plain ReLU and no dropout. MixMatch's own code has leaky ReLU.
    """

    feature_dim: int = 128
    min_image_px: int = 8

    def build(self) -> nn.Module:
        return PreActNetwork(stem=16, depths=(4, 4, 4), widths=(32, 64, 128), final_norm=True)
