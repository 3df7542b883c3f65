"""Nearest neighbours among features, by cosine similarity: exact, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024
"""Samples whose similarities to all others are held at a time."""


def nearest(
    queries_QD: Tensor, features_ND: Tensor, count: int, *, own_Q: Tensor | None = None, chunk: int = CHUNK
) -> Iterator[tuple[Tensor, Tensor]]:
    """The nearest of `features_ND` to each query, for `chunk` queries (q) at a time.

    Args:
        count: how many; at most as many as there are, without itself, are found.
        own_Q: int64, which of the features each query is itself, to be left out. Default: it is none of them.

    Yields:
        Cosine similarities, float32, and positions, int64, (q, count) each, the nearest first.
    """
    unit = normalize(features_ND.float())
    count = min(count, len(unit) - (own_Q is not None))
    for start in range(0, len(queries_QD), chunk):
        similarity = normalize(queries_QD[start : start + chunk].float()) @ unit.T
        if own_Q is not None:
            similarity.scatter_(1, own_Q[start : start + chunk, None], float("-inf"))
        found = similarity.topk(count, dim=1)
        yield found.values, found.indices


def nearest_others(features_ND: Tensor, count: int, *, chunk: int = CHUNK) -> Iterator[tuple[Tensor, Tensor]]:
    """The nearest neighbours of each sample, itself left out; see `nearest`."""
    own = torch.arange(len(features_ND), device=features_ND.device)
    return nearest(features_ND, features_ND, count, own_Q=own, chunk=chunk)
