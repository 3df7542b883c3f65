"""Which sample goes where: pure functions of their arguments, tested without a process group."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Draw = Literal["uniform", "balanced"]


def epoch_batches(count: int, batch: int, generator: torch.Generator) -> Tensor:
    """A shuffled epoch as full batches; the remainder sits out this epoch.

    Returns:
        int64 (count // batch, batch): sample positions, each at most once.
    """
    order = torch.randperm(count, generator=generator)
    steps = count // batch
    return order[: steps * batch].view(steps, batch)


def cycling_batches(positions: Tensor, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """`steps` batches drawn from one shuffled pass over `positions` after another.

    Returns:
        int64 (steps, batch). Any two positions differ in how often they occur by at most one.
    """
    wanted = steps * batch
    passes = -(-wanted // len(positions))
    order = torch.cat([positions[torch.randperm(len(positions), generator=generator)] for _ in range(passes)])
    return order[:wanted].view(steps, batch)


def balanced_batches(positions: Tensor, labels_N: Tensor, steps: int, batch: int, generator: torch.Generator) -> Tensor:
    """Like `cycling_batches`, but every class that is there occurs as often as any other, to within one, and within a
    class every position.

    Args:
        labels_N: of all samples, on the CPU.

    Returns:
        int64 (steps, batch).
    """
    own = labels_N[positions]
    classes = own.unique()
    class_of = cycling_batches(classes, steps, batch, generator)
    drawn = torch.empty_like(class_of)
    for label in classes.tolist():
        places = class_of == label
        if count := int(places.sum()):  # there may be more classes than places
            drawn[places] = cycling_batches(positions[own == label], 1, count, generator).flatten()
    return drawn


def labelled_batches(
    draw: Draw, positions: Tensor, labels_N: Tensor, steps: int, batch: int, generator: torch.Generator
) -> Tensor:
    """Batches of labelled samples, see `cycling_batches` (uniform) and `balanced_batches`."""
    if draw == "balanced":
        return balanced_batches(positions, labels_N.cpu(), steps, batch, generator)
    return cycling_batches(positions, steps, batch, generator)


def rank_slice(count: int, rank: int, size: int) -> slice:
    """The contiguous part of `count` things that belongs to `rank`; the parts differ in length by at most one."""
    return slice(count * rank // size, count * (rank + 1) // size)


def keep_lowest(losses_N: Tensor, fraction: float) -> Tensor:
    """The split: True for the `fraction` of samples with the lowest loss, one ranking over all classes.

    Equal losses are settled by position, so that every rank gets the same split.

    Returns:
        bool (N,) with exactly ``round(fraction * N)`` True, at least 1 and at most N - 1.
    """
    count = min(max(round(fraction * len(losses_N)), 1), len(losses_N) - 1)
    kept = torch.zeros(len(losses_N), dtype=torch.bool)
    kept[torch.argsort(losses_N, stable=True)[:count]] = True
    return kept
