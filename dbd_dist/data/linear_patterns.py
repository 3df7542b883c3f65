"""Patterns that mark a label: pure functions of pixels and given labels, tested without a network.

A trigger that is the same in all poisoned images is the one thing of them that a linear function of the pixels can see
well: objects are not linearly separable, a patch, a blended picture or a wave is. So for every label the linear
discriminant between its images and the others is fitted to one half of the images and applied to the other. Scores of
clean images of a label are one heap, not far from those of others; images with its trigger are a heap of their own, far
above.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist.data.split_rules import valley

SIDE = 32
"""Larger images are averaged down to so many pixels a side: covariances have to fit, and smaller patches are lost."""
RIDGE = 0.1
"""Added to the diagonal of the covariance, in mean variances."""
FAR = 5.0
"""Standard deviations: no heap of clean images reaches so far beyond the others, nor beyond its own lower quartile."""
BEYOND = 1.5
"""Times the lower quartile: a label that is told apart as a whole has scores of any size, one half's unlike the
other's."""
LOW, QUARTILE = 0.05, 0.25
BETWEEN_THEM = 0.97
"""Standard deviations from the one quantile to the other, of a normal distribution."""
LEAST = 0.02
"""Share of a label's images that lie as far as that before there is a trigger to speak of."""


def shrink(images_BCHW: Tensor) -> Tensor:
    """Images of `SIDE` pixels at most, flat: float32 (B, P)."""
    height, width = images_BCHW.shape[2:]
    images = images_BCHW.float()
    if max(height, width) > SIDE:
        factor = SIDE / max(height, width)
        images = F.interpolate(
            images, size=(max(round(height * factor), 1), max(round(width * factor), 1)), mode="area"
        )
    return images.flatten(1)


def pattern_scores(pixels_NP: Tensor, labels_N: Tensor, generator: torch.Generator) -> Tensor:
    """How much of what is linear about its label each image has: the ridge discriminant of the label against all others
    (after Fisher 1936, DOI 10.1111/j.1469-1809.1936.tb02137.x, with the covariance of the others), fitted to the half
    that the image is not in.

    Args:
        pixels_NP: float32, of one device.
        labels_N: int64, the given labels, of the same device.
        generator: deals the images to halves.

    Returns:
        float32 (N,): standard deviations above the mean of the other labels' images.
    """
    half_N = (torch.randperm(len(labels_N), generator=generator) % 2).to(labels_N.device)
    found = pixels_NP.new_zeros(len(labels_N))
    for half in (0, 1):
        fitted, held = (half_N != half).nonzero().flatten(), (half_N == half).nonzero().flatten()
        if len(fitted) < 2 or len(held) < 2:
            continue
        x, labels = pixels_NP[fitted], labels_N[fitted]
        x = x - x.mean(dim=0)
        moments = x.T @ x
        for label in labels.unique().tolist():
            own, others = x[labels == label], x[labels != label]
            held_others = labels_N[held] != label
            if len(others) < 2 or int(held_others.sum()) < 2 or bool(held_others.all()):
                continue
            centre = others.mean(dim=0)
            # of the others alone: with a trigger in it, it would weigh the trigger down
            covariance = (moments - own.T @ own) / len(others) - torch.outer(centre, centre)
            # images without any contrast leave a matrix of zeros
            covariance.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp_min(1e-12))
            difference = own.mean(dim=0) - centre
            weights = torch.cholesky_solve(difference[:, None], torch.linalg.cholesky(covariance)).squeeze(1)
            scores = pixels_NP[held] @ weights
            spread, mean = torch.std_mean(scores[held_others])
            found[held[~held_others]] = (scores[~held_others] - mean) / spread.clamp_min(1e-12)
    return found


def stand_out(scores_N: Tensor, labels_N: Tensor, classes: int) -> Tensor:
    """bool (N,): the images that carry what marks their label.

    Of a label whose images reach `FAR`, in a share of `LEAST` at least, those beyond the valley between the two heaps
    (`split_rules.valley`). Labels that a linear function tells apart as a whole, as it does scanned digits, have one
    heap, and none stand out.
    """
    found = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in range(classes):
        own = (labels_N == label).nonzero().flatten()
        if len(own) == 0:
            continue
        scores = scores_N[own].double()
        low, quartile = (float(scores.quantile(q)) for q in (LOW, QUARTILE))
        limit = BEYOND * max(quartile, 0.0) + FAR * max((quartile - low) / BETWEEN_THEM, 1.0)
        if int((scores > limit).sum()) > LEAST * len(own):
            found[own] = scores > valley(scores)
    return found
