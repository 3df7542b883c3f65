"""Group norm (Wu & He 2018, arXiv 1803.08494) in the place of batch norm, where images must not mix."""

from __future__ import annotations

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

GROUPS = 32
"""The paper's default; fewer where it does not divide the channels, as Opacus has it."""


def replace_batch_norm(network: nn.Module) -> None:
    """Replace every batch norm inside `network` by a group norm of gcd(32, channels) groups, its weights fresh."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                channels = child.num_features
                new = nn.GroupNorm(math.gcd(GROUPS, channels), channels, child.eps, child.affine)
                setattr(parent, name, new)


def has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())
