"""Networks. One backbone a file; `BACKBONES` holds them by name, and installed packages add to it through the entry
point group ``dbd_dist.backbones``.

A backbone is a frozen dataclass. Of its fields, those named as in `ModelConfig` (block, depths, widths, stem) take the
values of the flags ``--model.block`` and so on; a field `variant` takes what follows a colon in
``--model.backbone NAME:VARIANT``; any other field needs a default.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from data_prep.registry import Registry
from dbd_dist.models.preact_resnet import PreActResNet18
from dbd_dist.models.resnet import ResNet, ResNet18, ResNet34, ResNet50
from dbd_dist.models.timm import Timm
from dbd_dist.models.wide_resnet import WideResNet28x2


class Backbone(Protocol):
    """What every backbone has. One that takes images up to some size only also has `max_image_px`."""

    @property
    def feature_dim(self) -> int:
        """Dimensions of the features."""
        ...

    @property
    def min_image_px(self) -> int:
        """The smallest image side that leaves at least 2x2 positions for the last stage."""
        ...

    def build(self) -> nn.Module:
        """The network, images (B, 3, H, W) -> features (B, feature_dim); it also builds on the meta device."""
        ...


OWN: dict[str, type[Backbone]] = {
    "resnet": ResNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "preact_resnet18": PreActResNet18,
    "wide_resnet28_2": WideResNet28x2,
    "timm": Timm,
}
BACKBONES = Registry("backbones", OWN, needs=("build", "feature_dim", "min_image_px"))


def find_backbone(name: str) -> type[Backbone]:
    """The backbone of that name, without its variant; installed packages are read for names that are not our own.

    Raises:
        UserError: there is none.
    """
    return OWN[name] if name in OWN else BACKBONES.find(name, where="model.backbone")
