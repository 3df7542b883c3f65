"""Features in the plane: t-SNE (van der Maaten and Hinton 2008) of some samples."""

from __future__ import annotations

import numpy as np

POINTS = 800
"""Samples in a plot: a few seconds of computing."""
_FEWEST = 12


def choose(index: np.ndarray, poisoned: np.ndarray | None, limit: int = POINTS) -> np.ndarray:
    """Which samples to show: all where they are few, else poisoned ones up to a fifth and clean ones at random.

    At a poisoning rate of 1 % a plain random choice would show eight poisoned samples.

    Args:
        index: int64 (n,): samples that there are features of.
        poisoned: bool over all training samples, or None where that is not known.

    Returns:
        int64, sorted: a part of `index`; the same for the same arguments.
    """
    if len(index) <= limit:
        return np.sort(index)
    draw = np.random.default_rng(0)
    if poisoned is None:
        return np.sort(draw.choice(index, limit, replace=False))
    bad, good = index[poisoned[index]], index[~poisoned[index]]
    of_bad = min(len(bad), max(limit // 5, limit - len(good)))
    parts = (draw.choice(bad, of_bad, replace=False), draw.choice(good, limit - of_bad, replace=False))
    return np.sort(np.concatenate(parts))


def embed(features: np.ndarray) -> np.ndarray | str:
    """float32 (n, d) to float32 (n, 2), always the same way; a reason where they make no picture."""
    if len(features) < _FEWEST:
        return f"there are features of {len(features)} samples only"
    centred = features - features.mean(axis=0, dtype=np.float64)  # the difference of large float32 is no float32
    scale = float(np.abs(centred).max())
    if scale == 0:
        return "the features of all samples are the same"
    from sklearn.manifold import TSNE

    method = TSNE(
        perplexity=min(30.0, (len(features) - 1) / 3),
        init="pca" if features.shape[1] > 1 else "random",
        max_iter=600,  # at 800 points the picture no longer changes after that
        random_state=0,
    )
    return method.fit_transform((centred / scale).astype(np.float32))
