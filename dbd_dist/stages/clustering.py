"""Activation clustering: the features of a poisoned class fall into two clusters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dbd_dist.fields import require
from dbd_dist.stages.detector import Detector, Examined


@dataclass(frozen=True, kw_only=True)
class Clustering(Detector):
    """Activation clustering (Chen et al., SafeAI 2019, arXiv 1811.03728): the features of every class are reduced and
    split in two by k-means; where the two look like two populations, the smaller one is flagged."""

    name: ClassVar[str] = "clustering"
    title: ClassVar[str] = "Activation clustering"

    reduce: Literal["ica", "pca"] = "ica"
    """How features are reduced; the paper found ICA better."""
    dims: int = 10
    """Components that are left (paper: 10)."""
    rule: Literal["silhouette", "size"] = "silhouette"
    """What makes a class poisoned. silhouette: the clusters are well apart. size: they differ much in size."""
    silhouette: float = 0.1
    """Silhouette score from which the clusters count as two populations (paper: 0.10 to 0.15)."""
    size: float = 0.35
    """Share of a class up to which the smaller cluster counts as poisoned (IBM's Adversarial Robustness Toolbox: 0.35;
    the clusters of clean classes are about equal)."""

    def __post_init__(self):
        super().__post_init__()
        require(self, self.name, dims=">= 1", silhouette="in [-1, 1]", size="in (0, 0.5]")

    def examine(self, features_nD: Tensor, seed: int) -> Examined:
        from sklearn.cluster import KMeans  # a host that only trains with DBD has no scikit-learn
        from sklearn.metrics import silhouette_score

        features = features_nD.double().numpy()
        nothing = torch.zeros(len(features), dtype=torch.bool)
        reduced = self._reduced(features, seed)
        if reduced is None:
            return Examined(nothing, score=0.0, is_target=False)
        clusters = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)  # type: ignore[arg-type]
        smaller = torch.from_numpy(clusters == np.bincount(clusters, minlength=2).argmin())
        apart = float(silhouette_score(reduced, clusters))
        share = float(smaller.double().mean())
        is_target = apart >= self.silhouette if self.rule == "silhouette" else share <= self.size
        score = apart if self.rule == "silhouette" else 1 - share
        return Examined(smaller if is_target else nothing, score=score, is_target=is_target)

    def _reduced(self, features: np.ndarray, seed: int) -> np.ndarray | None:
        """(n, components); None where there is nothing to cluster: hardly a sample, or all the same."""
        from sklearn.decomposition import PCA, FastICA
        from sklearn.exceptions import ConvergenceWarning

        centred = features - features.mean(axis=0)
        dims = min(self.dims, int(np.linalg.matrix_rank(centred)), len(features) - 2)
        if dims < 1:
            return None
        if self.reduce == "pca":
            return PCA(dims, svd_solver="full").fit_transform(centred)
        with warnings.catch_warnings():  # components that are not quite independent cluster as well
            warnings.simplefilter("ignore", ConvergenceWarning)
            return FastICA(dims, whiten="unit-variance", max_iter=500, random_state=seed).fit_transform(centred)
