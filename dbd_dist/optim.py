"""Learning-rate schedules as functions of progress, and the optimisers that they drive."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


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


class WeightAverage(Generic[Network]):
    """An exponential moving average of a model's weights and batch-norm statistics, in a model of its own."""

    def __init__(self, model: Network, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        for mine, new in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(new, 1 - self._decay)
            else:
                mine.copy_(new)


class Lars(torch.optim.Optimizer):
    """LARS (You et al. 2017, arXiv 1708.03888, algorithm 1): SGD with momentum, where the rate of each weight tensor is
    scaled by the ratio of its norm to that of its gradient.

    Batch norm's parameters and biases, known by their one dimension, are neither scaled nor decayed, as in SimCLR (Chen
    et al. 2020, sec. 2.2). Nothing waits for the device.
    """

    TRUST = 0.001
    """eta of the paper."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    of_weight, of_grad = p.norm(), update.norm()
                    ratio = self.TRUST * of_weight / (of_grad + group["weight_decay"] * of_weight)
                    ratio = torch.where((of_weight > 0) & (of_grad > 0), ratio, 1.0)
                    update = ratio * update.add(p, alpha=group["weight_decay"])
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(buffer)


def sgd(parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)


def adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=lr, fused=True)
