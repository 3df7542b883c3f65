"""Projected gradient ascent on a classifier's loss (Madry et al. 2018, arXiv 1706.06083), in grey levels.

Pure functions of tensors. Every image is perturbed for itself: the result does not depend on its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dbd_dist import seeds

Norm = Literal["linf", "l2"]


def random_starts(index: list[int], px: int, *, norm: Norm, eps: float, seed: int) -> Tensor:
    """Differences uniform in the ball: float32 (B, 3, px, px), each drawn from (seed, its image's index) alone."""
    starts = torch.empty(len(index), 3, px, px)
    for start, i in zip(starts, index, strict=True):
        generator = seeds.generator(seed, "label-consistent", "start", i)
        if norm == "linf":
            start.uniform_(-eps, eps, generator=generator)
        else:
            start.normal_(generator=generator)
            radius = eps * torch.rand((), generator=generator) ** (1 / start.numel())
            start.mul_(radius / start.norm())
    return starts


def perturb(
    logits: Callable[[Tensor], Tensor],
    images_BCHW: Tensor,
    labels_B: Tensor,
    starts_BCHW: Tensor,
    *,
    norm: Norm,
    eps: float,
    step: float,
    steps: int,
    tick: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, Tensor]:
    """Raise the cross-entropy of the true labels within a ball around each image.

    Args:
        logits: of images in grey levels, floating point (B, 3, H, W) -> (B, K); differentiable.
        images_BCHW: uint8.
        starts_BCHW: floating point, where in the ball to start; its type is the one computed in.
        eps: radius of the ball, in grey levels.
        step: length of a step, in grey levels.
        tick: called after each step with its number; does not wait for the device.

    Returns:
        The perturbed images, uint8 (B, 3, H, W), in the ball; and an int64 scalar on the device, the first step whose
        loss or gradient was not finite, 0 where there was none.
    """
    original = images_BCHW.to(starts_BCHW.dtype)
    current = original + project(starts_BCHW, original, norm=norm, eps=eps)
    failed = torch.zeros((), dtype=torch.int64, device=images_BCHW.device)
    for number in range(1, steps + 1):
        current = current.detach().requires_grad_()
        loss = F.cross_entropy(logits(current), labels_B, reduction="sum")  # a mean's gradient would shrink with B
        (gradient,) = torch.autograd.grad(loss, current)
        finite = loss.isfinite() & gradient.isfinite().all()
        failed = torch.where((failed == 0) & ~finite, number, failed)
        moved = current.detach() + step * ascent(gradient, norm)
        current = original + project(moved - original, original, norm=norm, eps=eps)
        tick(number)
    return quantise(current.detach() - original, images_BCHW, norm=norm, eps=eps), failed


def ascent(gradient_BCHW: Tensor, norm: Norm) -> Tensor:
    """The direction of length 1 that the loss rises fastest in: the sign (linf), or the gradient over its length."""
    if norm == "linf":
        return gradient_BCHW.sign()
    return gradient_BCHW / _length(gradient_BCHW).clamp_min(1e-30)


def project(delta_BCHW: Tensor, original_BCHW: Tensor, *, norm: Norm, eps: float) -> Tensor:
    """The difference brought back into the ball, and then the image back into 0-255, which cannot leave the ball."""
    if norm == "linf":
        delta = delta_BCHW.clamp(-eps, eps)
    else:
        delta = delta_BCHW * (eps / _length(delta_BCHW).clamp_min(1e-30)).clamp_max(1)
    return (original_BCHW + delta).clamp(0, 255) - original_BCHW


def quantise(delta_BCHW: Tensor, images_BCHW: Tensor, *, norm: Norm, eps: float) -> Tensor:
    """The images plus their differences in whole grey levels, uint8, in the ball exactly.

    linf: rounded, and at most the whole part of eps. l2: rounded; where that made a difference longer than eps, the
    values that rounding lengthened most are shortened by one, as few as are needed.
    """
    near = delta_BCHW.round()
    if norm == "linf":
        limit = math.floor(eps)
        whole = near.clamp(-limit, limit).to(torch.int16)
    else:
        whole = _shorten(delta_BCHW.flatten(1).double(), near.flatten(1).double(), eps).view_as(near).to(torch.int16)
    return (images_BCHW.to(torch.int16) + whole).clamp(0, 255).to(torch.uint8)


def _shorten(delta_BD: Tensor, near_BD: Tensor, eps: float) -> Tensor:
    size = near_BD.abs()
    gained = size - delta_BD.abs()
    order = gained.argsort(dim=1, descending=True, stable=True)
    saved = (2 * size - 1).clamp_min(0).gather(1, order)  # of the squared length, by one level less
    excess = size.square().sum(dim=1, keepdim=True) - eps**2
    wanted = (saved.cumsum(dim=1) - saved < excess) & (saved > 0)
    fewer = torch.zeros_like(size).scatter(1, order, wanted.to(size.dtype))
    return near_BD.sign() * (size - fewer)


def _length(x_BCHW: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BCHW, dim=(1, 2, 3), keepdim=True)
