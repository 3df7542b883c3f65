"""What is trained: SimCLR's projection head, or a linear classifier, on a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dbd_dist.models.config import ModelConfig

Network = TypeVar("Network", bound=nn.Module)


class ContrastiveModel(nn.Module):
    """Backbone and SimCLR's projection head: Linear, batch norm, ReLU, Linear (Chen et al. 2020, sec. 2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.backbone = config.build_backbone()
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
        self.backbone = config.build_backbone()
        self.head = nn.Linear(config.feature_dim, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes)."""
        return self.head(self.backbone(images_BCHW))


def seeded(build: Callable[[], Network], generator: torch.Generator) -> Network:
    """`build()` with its weights drawn from `generator`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(generator.get_state())
        return build()
