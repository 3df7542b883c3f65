"""Residual networks with pre-activation (He et al. 2016, "Identity Mappings in Deep Residual Networks", arXiv
1603.05027)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from dbd_dist.models.resnet import he_initialise


@dataclass(frozen=True, kw_only=True)
class PreActResNet18:
    """PreAct ResNet-18 for small images, as BackdoorBench and other backdoor benchmarks have it: 11.17 M parameters
    with a head for 10 classes.

    Unlike the paper's it has no batch norm after the last stage. Weights have the benchmarks' names.
    """

    feature_dim: int = 512
    min_image_px: int = 16

    def build(self) -> nn.Module:
        return PreActNetwork(stem=64, depths=(2, 2, 2, 2), widths=(64, 128, 256, 512))


class PreActNetwork(nn.Module):
    """Images (B, 3, H, W) -> features (B, widths[-1]).

    Args:
        stem: channels of the first convolution, 3x3 with stride 1.
        depths: number of blocks in each stage; every stage after the first halves the resolution.
        widths: channels of each stage.
        final_norm: batch norm and ReLU after the last stage.
    """

    def __init__(self, *, stem: int, depths: tuple[int, ...], widths: tuple[int, ...], final_norm: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.stages, channels = len(widths), stem
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for i in range(depth):
                blocks.append(PreActBlock(channels, width, stride=2 if stage > 1 and i == 0 else 1))
                channels = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.bn1 = nn.BatchNorm2d(channels) if final_norm else None
        he_initialise(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.conv1(images_BCHW)
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        if self.bn1 is not None:
            x = F.relu(self.bn1(x), inplace=True)
        return x.mean(dim=(2, 3))


class PreActBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice; where the shape changes, a 1x1 convolution of the first activation is
    the shortcut."""

    def __init__(self, channels: int, width: int, *, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True)) + shortcut
