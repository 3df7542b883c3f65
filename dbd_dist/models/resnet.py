"""The networks: a residual backbone, SimCLR's projection head on it, or a linear classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from data_prep.errors import UserError

Network = TypeVar("Network", bound=nn.Module)

EXPANSION = {"basic": 1, "bottleneck": 4}
"""Output channels of each kind of block, as a multiple of its width."""

MAX_BLOCKS = 1000
MAX_WIDTH = 65536


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A residual network (He et al. 2016). The defaults are ResNet-18 with the CIFAR stem."""

    block: Literal["basic", "bottleneck"] = "basic"
    """Kind of residual block; bottleneck blocks have four times as many output channels as their width."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Number of blocks in each stage; every stage after the first halves the resolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage; the stem has as many as the first."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """cifar: 3x3 convolution, stride 1, no pooling. imagenet: 7x7, stride 2, then a 3x3 max-pool, stride 2."""
    projection_dim: int = 128
    """Output dimensions of SimCLR's projection head; its hidden layer is as wide as the features."""

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
        if self.projection_dim < 1:
            raise UserError(f"{self.projection_dim} is below 1", where="model.projection_dim")
        if sum(self.depths) > MAX_BLOCKS:  # a description from elsewhere must not build for hours
            raise UserError(f"{self.depths} blocks", where="model.depths", expected=f"at most {MAX_BLOCKS} in all")
        for name, width in (("widths", max(self.widths)), ("projection_dim", self.projection_dim)):
            if width > MAX_WIDTH:
                raise UserError(f"{width} is too wide", where=f"model.{name}", expected=f"at most {MAX_WIDTH}")

    @property
    def feature_dim(self) -> int:
        """Dimensions of the pooled features."""
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def min_image_px(self) -> int:
        """The smallest image side that leaves at least 2x2 positions for the last stage."""
        return 2 * 2 ** (len(self.widths) - 1) * (4 if self.stem == "imagenet" else 1)


class Backbone(nn.Module):
    """Images (B, 3, H, W) -> features (B, feature_dim), out of torchvision's residual blocks.

    With the default widths and the imagenet stem its parameters have the names of `torchvision.models.resnet18`.
    """

    def __init__(self, config: ModelConfig):
        # here, since it takes seconds: a command, and Ray Train's controller, build no network
        from torchvision.models.resnet import BasicBlock, Bottleneck

        super().__init__()
        width = config.widths[0]
        if config.stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.stages = len(config.widths)
        channels, block = width, {"basic": BasicBlock, "bottleneck": Bottleneck}[config.block]
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True), start=1):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                shortcut = None
                if stride != 1 or channels != width * block.expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, width * block.expansion, 1, stride=stride, bias=False),
                        nn.BatchNorm2d(width * block.expansion),
                    )
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images_BCHW))))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean(dim=(2, 3))


class ContrastiveModel(nn.Module):
    """Backbone and SimCLR's projection head: Linear, batch norm, ReLU, Linear (Chen et al. 2020, sec. 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.backbone = Backbone(config)
        dim = config.feature_dim
        self.projection = nn.Sequential(
            nn.Linear(dim, dim),
            nn.BatchNorm1d(dim),
            nn.ReLU(inplace=True),
            nn.Linear(dim, config.projection_dim),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Projections (B, projection_dim), not normalised."""
        return self.projection(self.backbone(images_BCHW))


class Classifier(nn.Module):
    """Backbone and a linear head."""

    def __init__(self, config: ModelConfig, num_classes: int):
        super().__init__()
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.feature_dim, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.backbone(images_BCHW))


def seeded(build: Callable[[], Network], generator: torch.Generator) -> Network:
    """`build()` with its weights drawn from `generator`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator.get_state())
        return build()
