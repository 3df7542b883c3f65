"""Learning-rate schedules as functions of progress, and the optimisers that they drive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def cosine(progress: float, warmup: float = 0.0) -> float:
    """Factor on the peak learning rate at `progress` in [0, 1]: linear up to `warmup`, then half a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))


def steps_down(epoch: int, milestones: Sequence[int]) -> float:
    """Times 0.1 for each milestone that lies behind `epoch` (counted from 0)."""
    return 0.1 ** sum(epoch >= m for m in milestones)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=lr, fused=True)
