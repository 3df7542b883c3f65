"""Which samples keep their labels: pure functions of losses and given labels, tested without a network.

`sampling.keep_lowest` is the published rule, one ranking over all classes. The rules here look at each given class by
itself, so that classes that are hard to learn keep samples too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dbd_dist.data.neighbours import CHUNK, nearest_others

EM_STEPS = 200


def class_quota(labels_N: Tensor, classes: int, fraction: float) -> int:
    """How many samples of every given class make up `fraction` of all: an equal count, where a share would keep more of
    a class that poisoned samples swell. Smaller classes are kept whole, and others fill up for them.

    Returns:
        The largest count c with ``sum(min(c, size of class)) <= round(fraction * N)``, at least 1.
    """
    sizes = torch.bincount(labels_N, minlength=classes).sort().values.tolist()
    left = round(fraction * len(labels_N))
    for done, size in enumerate(sizes):
        here = left // (len(sizes) - done)
        if here < size:
            return max(here, 1)
        left -= size
    return max(sizes)


def keep_balanced(losses_N: Tensor, labels_N: Tensor, classes: int, fraction: float) -> Tensor:
    """True for the samples with the lowest losses of every given class, an equal count each (`class_quota`; the idea is
    UNICON's, Karim et al. 2022, arXiv 2203.14542).

    Equal losses are settled by position.

    Returns:
        bool (N,).
    """
    quota = class_quota(labels_N, classes, fraction)
    return _lowest_of_each(losses_N, labels_N, classes, lambda _: quota)


def _lowest_of_each(scores_N: Tensor, labels_N: Tensor, classes: int, count: Callable[[Tensor], int]) -> Tensor:
    """bool (N,): the lowest scores of every given class; `count` says how many of its scores, float64, rising."""
    kept = torch.zeros(len(scores_N), dtype=torch.bool)
    for label in range(classes):
        own = (labels_N == label).nonzero().flatten()
        if len(own) == 0:
            continue
        order = torch.argsort(scores_N[own], stable=True)
        kept[own[order[: count(scores_N[own[order]].double())]]] = True
    return kept


def keep_mixture(losses_N: Tensor, labels_N: Tensor, classes: int, least: float, most: float) -> Tensor:
    """True for the samples that a mixture of two Gaussians, fitted to the losses of their given class, counts to the
    lower one (DivideMix, Li et al. 2020, arXiv 2002.07394, sec. 3.1), in each class between the quotas of `least` and
    `most` (`class_quota`).

    Returns:
        bool (N,).
    """
    low, high = (class_quota(labels_N, classes, fraction) for fraction in (least, most))

    def count(losses: Tensor) -> int:
        return min(max(int((losses <= valley(losses)).sum()), low), high)

    return _lowest_of_each(losses_N, labels_N, classes, count)


def keep_trusted(wrong_N: Tensor, labels_N: Tensor, classes: int, least: float, most: float, share: float) -> Tensor:
    """True for the largest part of every given class, the least doubtful first, among which no more than `share` of the
    labels are expected to be wrong (the false discovery rate as a mean of posteriors, Efron 2007, DOI
    10.1214/009053606000001460), in each class between the quotas of `least` and `most` (`class_quota`).

    Args:
        wrong_N: the probability that a label is wrong, see `label_noise.wrong_label_probability`.

    Returns:
        bool (N,).
    """
    low, high = (class_quota(labels_N, classes, fraction) for fraction in (least, most))

    def count(wrong: Tensor) -> int:
        expected = wrong.cumsum(0) / torch.arange(1, len(wrong) + 1)  # rises, as means of rising values do
        return min(max(int((expected <= share).sum()), low), high)

    return _lowest_of_each(wrong_N, labels_N, classes, count)


def valley(losses_N: Tensor) -> float:
    """Where the lower of two Gaussians, fitted to losses by expectation maximisation, stops being the likelier one.

    Args:
        losses_N: float64 (N,), at least one.

    Returns:
        A threshold: losses at or below it belong to the lower component; the largest loss where all are equal.
    """
    low, high = float(losses_N.min()), float(losses_N.max())
    if high - low < 1e-12:
        return high
    x = (losses_N - low) / (high - low)  # DivideMix normalises too: the floor on variances has a scale then
    means, variances, shares = [0.0, 1.0], [0.1, 0.1], [0.5, 0.5]
    for _ in range(EM_STEPS):
        densities = torch.stack(
            [
                shares[c] * torch.exp(-((x - means[c]) ** 2) / (2 * variances[c])) / math.sqrt(variances[c])
                for c in (0, 1)
            ]
        )
        weights = densities / densities.sum(dim=0).clamp_min(1e-300)
        totals = weights.sum(dim=1)
        before = list(means)
        for c in (0, 1):
            total = max(float(totals[c]), 1e-12)
            means[c] = float((weights[c] * x).sum()) / total
            variances[c] = max(float((weights[c] * (x - means[c]) ** 2).sum()) / total, 1e-4)
            shares[c] = float(totals[c]) / len(x)
        if max(abs(a - b) for a, b in zip(before, means)) < 1e-9:
            break
    # from the lower mean upwards, the first place where the upper component is the likelier
    grid = torch.linspace(means[0], means[1], 1001, dtype=torch.float64)
    lower, upper = (
        math.log(max(shares[c], 1e-300)) - math.log(variances[c]) / 2 - (grid - means[c]) ** 2 / (2 * variances[c])
        for c in (0, 1)
    )
    beyond = (upper > lower).nonzero().flatten()
    edge = float(grid[int(beyond[0])]) if len(beyond) else 1.0
    return low + edge * (high - low)


def neighbour_distance(features_ND: Tensor, neighbours: int, *, chunk: int = CHUNK) -> Tensor:
    """How far each sample lies from its nearest neighbours: 1 - their mean cosine similarity, itself left out.

    Poisoned samples of one trigger that the features do see are a small group of their own; counted over more
    neighbours than the group has members, each of them is far from others (distance to neighbours as in Ramaswamy et
    al. 2000, SIGMOD).

    Args:
        features_ND: float32, of one device.
        neighbours: how many count, at most N - 1.

    Returns:
        float32 (N,), 0 to 2.
    """
    return torch.cat([1 - near.mean(dim=1) for near, _ in nearest_others(features_ND, neighbours, chunk=chunk)])


def neighbour_votes(
    features_ND: Tensor, labels_N: Tensor, classes: int, neighbours: int, *, chunk: int = CHUNK
) -> Tensor:
    """What the nearest neighbours of each sample are labelled, itself left out (SimiFeat, Zhu et al. 2022, arXiv
    2110.06283, sec. 4: votes of labels among neighbours by cosine similarity).

    Args:
        features_ND: float32, of one device.
        neighbours: how many vote, at most N - 1.

    Returns:
        float32 (N, K), shares of votes; rows sum to 1.
    """
    found = nearest_others(features_ND, neighbours, chunk=chunk)
    return torch.cat([one_hot(labels_N[near], classes).float().mean(dim=1) for _, near in found])
