"""How likely each given label is wrong, told from the labels themselves: pure functions, tested without a network.

A poisoned sample looks like its true class and carries another's label. Where features are good, its loss shows that.
Where they are weak, hard clean samples have such losses too, and no ranking of losses can tell them apart. The labels
of easy samples can: among those that are surely a plane or surely a ship, hardly any is labelled "cat", unless cats are
what somebody poisons with. So each class gets a rate at which samples of other classes carry its label, and a label is
as doubtful as that rate and the sample's features say together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
PENALTY = 0.004
"""Weight of the squared coefficients beside the mean cross-entropy: features are standardised, and labels not to be
learnt by heart."""
STEPS = 100
ANCHORS = 0.1
"""Share of an average class that counts as surely of it."""
OF_OTHERS = 2 / 3
"""Share of the other classes that a rate is the mean of, those with the lowest: the rest may look alike."""
FLOOR = 1e-4
"""The least rate: within a class whose labels nothing speaks against, samples are still ranked."""


def held_out_probabilities(
    features_ND: Tensor, labels_N: Tensor, classes: int, generator: torch.Generator, *, folds: int = FOLDS
) -> Tensor:
    """What multinomial logistic regressions on the features say of each sample, none of which it was fitted to.

    Args:
        features_ND: float32, of one device.
        labels_N: int64, the given labels, of the same device.
        generator: deals the samples to the folds.

    Returns:
        float32 (N, K), rows sum to 1.
    """
    fold_N = (torch.randperm(len(labels_N), generator=generator) % folds).to(labels_N.device)
    found = features_ND.new_empty(len(labels_N), classes)
    for fold in range(folds):
        held = fold_N == fold
        if not held.any():
            continue
        fitted = features_ND[~held]
        mean, scale = fitted.mean(dim=0), fitted.std(dim=0).clamp_min(1e-6)
        weight, bias = _logistic_regression((fitted - mean) / scale, labels_N[~held], classes)
        found[held] = F.softmax((features_ND[held] - mean) / scale @ weight + bias, dim=1)
    return found


def _logistic_regression(x_ND: Tensor, labels_N: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The coefficients (D, K) and (K,) with the least mean cross-entropy plus `PENALTY` times their squares."""
    with torch.enable_grad():
        weight = x_ND.new_zeros(x_ND.shape[1], classes, requires_grad=True)
        bias = x_ND.new_zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x_ND @ weight + bias, labels_N) + PENALTY * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    return weight.detach(), bias.detach()


def noise_rates(probabilities_NK: Tensor, labels_N: Tensor) -> Tensor:
    """How often samples that are surely of another class are given each label.

    The samples that are most probably of a class are its anchors: their given labels are an estimate of how labels are
    corrupted (Liu and Tao 2016, arXiv 1411.7718; Patrini et al. 2017, arXiv 1609.03683, sec. 3.1). Classes that look
    alike get each other's labels by mistake of the classifier; a trigger's target class gets them from everywhere. So
    the rate of a label is its mean share among the anchors of two thirds of the other classes, those with the lowest.
    A mapping that sends every class to another one is not seen.

    Returns:
        float32 (K,), at least `FLOOR`.
    """
    classes = probabilities_NK.shape[1]
    count = min(max(round(ANCHORS * len(labels_N) / classes), 1), len(labels_N))
    anchors_MK = probabilities_NK.topk(count, dim=0).indices
    share_JK = torch.stack([torch.bincount(labels_N[own], minlength=classes) / count for own in anchors_MK.T])
    of_others = share_JK.float().masked_fill(torch.eye(classes, dtype=torch.bool, device=share_JK.device), 2.0)
    taken = max(round(OF_OTHERS * (classes - 1)), 1)
    return of_others.sort(dim=0).values[:taken].mean(dim=0).clamp(FLOOR, 1 - FLOOR)


def wrong_label_probability(probabilities_NK: Tensor, labels_N: Tensor, rates_K: Tensor) -> Tensor:
    """Bayes' rule: the probability that a sample is of another class than its label says, where samples of others are
    given this label at that rate, and its own keep theirs.

    Returns:
        float32 (N,).
    """
    own = probabilities_NK.gather(1, labels_N[:, None]).squeeze(1)
    wrong = (1 - own).clamp_min(0) * rates_K[labels_N]
    return wrong / (own + wrong).clamp_min(1e-12)
