"""How well a split or features tell poisoned samples from others: pure functions, which the truth is handed to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dbd_dist.data.neighbours import nearest

MOST_SUSPECT = (250, 500, 1000)
"""Numbers of most suspect samples of a training set of 50,000 (Huang et al. 2022, discussion with reviewers)."""


def split_quality(losses_N: Tensor, kept_N: Tensor, poisoned_N: Tensor, labels_N: Tensor) -> dict[str, Any]:
    """How well a split finds poisoned samples.

    Args:
        losses_N: what samples were ranked by.
        kept_N: bool, who keeps a label.
        labels_N: the given labels.

    Returns:
        ``auroc`` of the losses; ``tpr`` and ``fpr``: the share of the poisoned and of the other samples that lose
        their label; ``most_suspect``: see there, by loss. None without poisoned samples.
    """
    if not poisoned_N.any() or poisoned_N.all():
        return {"auroc": None, "tpr": None, "fpr": share(~kept_N[~poisoned_N]), "most_suspect": None}
    return {
        "auroc": auroc(poisoned_N, losses_N),
        "tpr": share(~kept_N[poisoned_N]),
        "fpr": share(~kept_N[~poisoned_N]),
        "most_suspect": most_suspect(losses_N, poisoned_N, labels_N),
    }


def most_suspect(scores_N: Tensor, poisoned_N: Tensor, labels_N: Tensor) -> list[list[Any]]:
    """The share of poisoned samples among those with the highest scores that carry an attacker's label.

    Returns:
        For each of `MOST_SUSPECT`, in proportion to the size of the set, the number of samples and the share.
    """
    targets = torch.isin(labels_N, labels_N[poisoned_N].unique()).nonzero().flatten()
    by_score = targets[torch.argsort(scores_N[targets], descending=True, stable=True)]
    counts = [min(max(round(count * len(scores_N) / 50_000), 1), len(by_score)) for count in MOST_SUSPECT]
    return [[count, share(poisoned_N[by_score[:count]])] for count in counts]


def auroc(positive_N: Tensor, scores_N: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in which the positive one has the higher score, ties as a half; from
    ranks, as Mann and Whitney (1947) count. Both kinds have to occur. A host that only trains has no scikit-learn."""
    scores = scores_N.double()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[inverse]  # from 1, mean over ties
    count = int(positive_N.sum())
    return float((ranks[positive_N].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def share(chosen: Tensor) -> float | None:
    """The share of True in bool (n,); None where there is nothing."""
    return float(chosen.double().mean()) if len(chosen) else None


def feature_quality(
    features_ND: Tensor,
    given_N: Tensor,
    true_N: Tensor,
    poisoned_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    neighbours: int = 20,
) -> dict[str, Any]:
    """How features group images.

    Returns:
        ``knn_acc``: the share of test images whose nearest benign training images, voting with their true labels,
        name their class. ``poisoned_near_true`` and ``poisoned_near_given``: the mean share of the neighbours of a
        poisoned sample (among all training samples, by given label) that carry its true and its given class; None
        without poisoned samples.
    """
    benign = ~poisoned_N
    found: dict[str, Any] = {"poisoned_near_true": None, "poisoned_near_given": None}
    near = torch.cat([positions for _, positions in nearest(test_MD, features_ND[benign], neighbours)])
    found["knn_acc"] = share(true_N[benign][near].mode(dim=1).values == test_labels_M)
    if poisoned_N.any():
        own = poisoned_N.nonzero().flatten()
        around = nearest(features_ND[own], features_ND, neighbours, own_Q=own)
        labels_of_near = given_N[torch.cat([positions for _, positions in around])]
        for name, labels in (("true", true_N), ("given", given_N)):
            found[f"poisoned_near_{name}"] = float((labels_of_near == labels[own, None]).double().mean())
    return found
