"""Residual networks (He et al. 2016, arXiv 1512.03385).

The blocks are those of torchvision, module by module: names, draws of weights and outputs are the same (tested).
Importing torchvision takes 2 s of a core, also of a command that only counts a network's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from data_prep.errors import UserError

Block = Literal["basic", "bottleneck"]
Stem = Literal["cifar", "imagenet"]

EXPANSION = {"basic": 1, "bottleneck": 4}
"""Output channels of each kind of block, as a multiple of its width."""

MAX_BLOCKS = 1000
MAX_WIDTH = 65536


class _Residual:
    """What all of them share; a subclass gives the four, as fields or as constants."""

    block: Block
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Stem

    @property
    def feature_dim(self) -> int:
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def min_image_px(self) -> int:
        return 2 * 2 ** (len(self.widths) - 1) * (4 if self.stem == "imagenet" else 1)

    def build(self) -> nn.Module:
        return ResidualNetwork(self.block, self.depths, self.widths, self.stem)


@dataclass(frozen=True, kw_only=True)
class ResNet(_Residual):
    """A residual network of any shape."""

    block: Block
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Stem

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths:
            raise UserError(
                f"depths {self.depths} and widths {self.widths} name a different number of stages",
                where="model.depths, model.widths",
                expected="one depth and one width per stage",
            )
        for name in ("depths", "widths"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"{getattr(self, name)} holds a number below 1", where=f"model.{name}")
        if sum(self.depths) > MAX_BLOCKS:  # a description from elsewhere must not build for hours
            raise UserError(f"{self.depths} blocks", where="model.depths", expected=f"at most {MAX_BLOCKS} in all")
        if max(self.widths) > MAX_WIDTH:
            raise UserError(f"{max(self.widths)} is too wide", where="model.widths", expected=f"at most {MAX_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class ResNet18(_Residual):
    """ResNet-18: 11.17 M parameters."""

    stem: Stem = "cifar"
    block, depths, widths = "basic", (2, 2, 2, 2), (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class ResNet34(_Residual):
    """ResNet-34: 21.28 M parameters."""

    stem: Stem = "cifar"
    block, depths, widths = "basic", (3, 4, 6, 3), (64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class ResNet50(_Residual):
    """ResNet-50, with the stride of a bottleneck block in its 3x3 convolution: 23.5 M parameters."""

    stem: Stem = "cifar"
    block, depths, widths = "bottleneck", (3, 4, 6, 3), (64, 128, 256, 512)


def _conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = _conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 (with the stride) and 1x1 beside a shortcut."""

    def __init__(self, channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        wide = width * EXPANSION["bottleneck"]
        self.conv1 = _conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, wide, 1)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResidualNetwork(nn.Module):
    """Images (B, 3, H, W) -> features (B, feature_dim).

    With the imagenet stem its parameters have the names of `torchvision.models.resnet18` and its like.
    """

    def __init__(self, kind: Block, depths: tuple[int, ...], widths: tuple[int, ...], stem: Stem):
        super().__init__()
        width = widths[0]
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = len(widths)
        channels, block, expansion = width, {"basic": BasicBlock, "bottleneck": Bottleneck}[kind], EXPANSION[kind]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                shortcut = None
                if stride != 1 or channels != width * expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, width * expansion, 1, stride=stride, bias=False),
                        nn.BatchNorm2d(width * expansion),
                    )
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        he_initialise(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean(dim=(2, 3))


def he_initialise(network: nn.Module) -> None:
    """Draw the weights of all convolutions anew (He et al. 2015, arXiv 1502.01852, mode fan_out)."""
    for module in network.modules():
        # without numbers there is nothing to draw, and torch would import its compiler for it, 2 s
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
