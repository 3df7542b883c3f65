"""Which network a run trains."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from data_prep.errors import UserError
from dbd_dist.models import Backbone, find_backbone
from dbd_dist.models.group_norm import replace_batch_norm
from dbd_dist.models.resnet import MAX_WIDTH, Block, Stem

SHAPE = ("block", "depths", "widths", "stem")
"""Fields that only some backbones take: those that have a field of the same name."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A backbone. The defaults are ResNet-18 with the CIFAR stem (He et al. 2016)."""

    block: Block = "basic"
    """Kind of residual block; bottleneck blocks have four times as many output channels as their width."""
    depths: tuple[int, ...] = (2, 2, 2, 2)
    """Number of blocks in each stage; every stage after the first halves the resolution."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Channels of each stage; the stem has as many as the first."""
    stem: Stem = "cifar"
    """cifar: 3x3 convolution, stride 1, no pooling. imagenet: 7x7, stride 2, then a 3x3 max-pool, stride 2."""
    projection_dim: int = 128
    """Output dimensions of SimCLR's projection head; its hidden layer is as wide as the features."""
    backbone: str = field(default="resnet", metadata={"omit_default": True})
    """resnet: of the block, depths, widths and stem above. Or a network of fixed shape: resnet18, preact_resnet18,
    timm:NAME, ...; an unknown name lists all."""
    norm: Literal["batch", "group"] = field(default="batch", metadata={"omit_default": True})
    """group: every batch norm of the backbone is replaced by group norm (Wu & He 2018, arXiv 1803.08494), which treats
    each image alone."""
    weights: Path | None = field(default=None, metadata={"omit_default": True})
    """Start from the backbone's weights in this file: safetensors, or a state dict saved by PyTorch."""

    def __post_init__(self):
        if self.projection_dim < 1:
            raise UserError(f"{self.projection_dim} is below 1", where="model.projection_dim")
        if self.projection_dim > MAX_WIDTH:
            raise UserError(
                f"{self.projection_dim} is too wide", where="model.projection_dim", expected=f"at most {MAX_WIDTH}"
            )
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        changed = [name for name in self.unused if getattr(self, name) != defaults[name]]
        if changed:
            raise UserError(
                f"{self.backbone} has a shape of its own and takes no {', '.join(changed)}",
                where=", ".join(f"model.{name}" for name in changed),
                hint="leave that out, or use --model.backbone resnet",
            )
        self.architecture  # noqa: B018 - the backbone checks its own fields
        if self.weights is not None:  # workers may have another current folder
            object.__setattr__(self, "weights", self.weights.absolute())

    @property
    def unused(self) -> tuple[str, ...]:
        """Fields that the backbone does not take; they hold their defaults."""
        taken = _fields(find_backbone(self.backbone.partition(":")[0]))
        return tuple(name for name in SHAPE if name not in taken)

    @property
    def architecture(self) -> Backbone:
        """The backbone, with the fields that it takes.

        Raises:
            UserError: the backbone refuses one of them, or has a field that no flag gives.
        """
        name, colon, variant = self.backbone.partition(":")
        part: Any = find_backbone(name)
        fields = _fields(part)
        given: dict[str, Any] = {f: getattr(self, f) for f in SHAPE if f in fields}
        if bool(colon) != ("variant" in fields):
            expected = f"{name}:NAME" if "variant" in fields else name
            raise UserError(f"there is no backbone {self.backbone!r}", where="model.backbone", expected=expected)
        if colon:
            given["variant"] = variant
        lacking = [f for f, p in fields.items() if p.default is p.empty and f not in given]
        if lacking:
            raise UserError(
                f"the backbone {name} has fields that no flag gives: {', '.join(lacking)}",
                where="model.backbone",
                expected="a default for each",
            )
        return part(**given) if isinstance(part, type) else part

    @property
    def feature_dim(self) -> int:
        """Dimensions of the backbone's features."""
        return self.architecture.feature_dim

    @property
    def min_image_px(self) -> int:
        """The smallest image side that the backbone takes."""
        return self.architecture.min_image_px

    def build_backbone(self) -> nn.Module:
        """The network, images (B, 3, H, W) -> features (B, feature_dim), freshly initialised."""
        network = self.architecture.build()
        if self.norm == "group":
            replace_batch_norm(network)
        return network

    def with_backbone(self, name: str) -> ModelConfig:
        """Another backbone in this one's place: fields that it does not take go back to their defaults.

        Raises:
            UserError: there is no such backbone.
        """
        fresh = ModelConfig(backbone=name)
        kept = {f: getattr(self, f) for f in SHAPE if f not in fresh.unused}
        return dataclasses.replace(
            fresh, **kept, projection_dim=self.projection_dim, norm=self.norm, weights=self.weights
        )

    def check_image_px(self, image_px: int, where: str | PathLike[str]) -> None:
        """Refuse images of a size that the backbone does not take.

        Args:
            where: the data set, for the message.

        Raises:
            UserError
        """
        backbone = self.architecture
        low, high = backbone.min_image_px, getattr(backbone, "max_image_px", None)
        if low <= image_px and (high is None or image_px <= high):
            return
        size = "small" if image_px < low else "large"
        stages = f" of {len(self.widths)} stages with the {self.stem} stem" if self.backbone == "resnet" else ""
        raise UserError(
            f"images of {image_px} px are too {size} for the backbone {self.backbone}{stages}",
            where=where,
            expected=f"{low} px" if low == high else f"at least {low} px" if size == "small" else f"at most {high} px",
            hint="use another --model.backbone or --model.stem, fewer --model.widths, or prepare images of that size",
        )


def _fields(part: Any) -> Mapping[str, inspect.Parameter]:
    """What a backbone's class is called with; nothing where an instance is registered."""
    return inspect.signature(part).parameters if isinstance(part, type) else {}
