"""How well a ranking of the training samples finds the poisoned ones."""

from __future__ import annotations

import numpy as np

from dbd_dist.reporting.arrays import Split
from dbd_dist.reporting.data import Data

SHARES = (0.1, 0.2, 0.4)
"""Of as many samples as are poisoned: 250, 500 and 1,000 of CIFAR-10's 2,500."""


def auroc(scores: np.ndarray, poisoned: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a poisoned sample scores above a clean one, ties counting half.

    Args:
        scores: float (n,), higher is more suspect.
        poisoned: bool (n,).

    Returns:
        0-1; None where all samples are of one kind.
    """
    if poisoned.all() or not poisoned.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(poisoned, scores))


def found_among(scores: np.ndarray, poisoned: np.ndarray, count: int) -> float:
    """Share of poisoned samples among the `count` highest scores; equal scores by index."""
    return float(poisoned[np.argsort(-scores, kind="stable")[:count]].mean())


def measure(split: Split, data: Data) -> dict[str, float | None]:
    """What a split found, where the truth is known; empty elsewhere and without poisoned samples.

    ``tpr`` and ``fpr`` are the shares of the poisoned and of the clean samples whose labels are dropped; ``found_10``
    the share of poisoned samples among the most suspect of the target class, as many as 10 % of the poisoned ones.
    """
    if data.truth is None or not data.truth.poisoned.any():
        return {}
    poisoned, target = data.truth.poisoned, data.manifest.target
    of = np.ones(len(poisoned), dtype=bool) if target is None else data.labels == target
    found = {
        f"found_{100 * share:.0f}": found_among(split.loss[of], poisoned[of], max(round(share * poisoned.sum()), 1))
        for share in SHARES
    }
    return {
        "auroc_first": auroc(split.first_loss, poisoned),
        "auroc_last": auroc(split.loss, poisoned),
        "tpr": float((~split.kept)[poisoned].mean()),
        "fpr": float((~split.kept)[~poisoned].mean()),
        **found,
    }
