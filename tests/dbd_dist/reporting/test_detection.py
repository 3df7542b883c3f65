"""Rankings against loops over pairs."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.dataset.truth import read_truth
from dbd_dist.reporting import detection
from dbd_dist.reporting.data import find_data
from dbd_dist.reporting.runs import load_run


def test_auroc_is_the_chance_that_a_poisoned_sample_scores_higher():
    rng = np.random.default_rng(0)
    scores, poisoned = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.3
    pairs = [(bad > good) + (bad == good) / 2 for bad in scores[poisoned] for good in scores[~poisoned]]
    assert detection.auroc(scores, poisoned) == pytest.approx(np.mean(pairs))
    assert detection.auroc(scores, np.zeros(40, dtype=bool)) is None


def test_found_among_the_highest():
    scores = np.array([1.0, 5.0, 3.0, 4.0])
    poisoned = np.array([True, True, False, False])
    assert [detection.found_among(scores, poisoned, n) for n in (1, 2, 3, 4)] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])


def test_measures_of_a_split(make_run, poisoned):
    run = load_run(make_run(poisoned))
    data, truth = find_data(run), read_truth(poisoned.folder)["train"].poisoned
    assert run.split is not None
    assert not isinstance(data, str)
    found = detection.measure(run.split, data)
    assert found["tpr"] == sum(1 for k, p in zip(run.split.kept, truth) if p and not k) / truth.sum()
    assert found["fpr"] == sum(1 for k, p in zip(run.split.kept, truth) if not p and not k) / (~truth).sum()
    # of 12 poisoned samples 40 % are 5: the five highest losses among samples that carry the target's label
    ranked = sorted(np.flatnonzero(data.labels == 0), key=lambda i: -run.split.loss[i])  # type: ignore[union-attr]
    assert found["found_40"] == pytest.approx(np.mean([truth[i] for i in ranked[:5]]))


def test_nothing_without_truth(make_run, untrusted):
    run = load_run(make_run(untrusted, asr=None))
    data = find_data(run)
    assert run.split is not None
    assert not isinstance(data, str)
    assert detection.measure(run.split, data) == {}
