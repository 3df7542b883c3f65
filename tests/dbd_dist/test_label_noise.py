"""How likely each label is wrong, against scikit-learn, loops and data whose wrong labels are known."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dbd_dist.data.label_noise import (
    ANCHORS,
    FLOOR,
    FOLDS,
    OF_OTHERS,
    PENALTY,
    held_out_probabilities,
    noise_rates,
    wrong_label_probability,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_overlapping(count: int, classes: int, *, distance: float, poisoned: float, seed: int = 0):
    """Gaussian classes on a line, neighbours overlapping; a share of the other classes' samples is labelled 1.

    Returns:
        Features (N, 4), given labels, true labels.
    """
    draws = generator(seed)
    true = torch.arange(count) % classes
    features = torch.randn(count, 4, generator=draws)
    features[:, 0] += distance * true
    given = true.clone()
    wrong = (torch.rand(count, generator=draws) < poisoned) & (true != 1)
    given[wrong] = 1
    return features, given, true


def test_probabilities_are_those_of_a_regression_that_did_not_see_the_sample():
    features, labels, _ = make_overlapping(200, 3, distance=1.5, poisoned=0.1)
    found = held_out_probabilities(features, labels, 3, generator(7))
    folds = torch.randperm(200, generator=generator(7)) % FOLDS
    for fold in range(FOLDS):
        fitted, held = features[folds != fold], features[folds == fold]
        mean, scale = fitted.mean(dim=0), fitted.std(dim=0)
        # scikit-learn weighs the sum of cross-entropies with C, and half the squares with 1
        oracle = LogisticRegression(C=1 / (2 * PENALTY * len(fitted)), max_iter=1000, tol=1e-8)
        oracle.fit(((fitted - mean) / scale).numpy(), labels[folds != fold].numpy())
        expected = torch.from_numpy(oracle.predict_proba(((held - mean) / scale).numpy())).float()
        torch.testing.assert_close(found[folds == fold], expected, atol=2e-3, rtol=0)


def test_probabilities_need_no_sample_of_every_class_in_every_fold():
    features, labels, _ = make_overlapping(30, 3, distance=3, poisoned=0)
    labels[labels == 2] = 0
    labels[5] = 2
    found = held_out_probabilities(features, labels, 4, generator())
    torch.testing.assert_close(found.sum(dim=1), torch.ones(30))


def test_rates_against_a_loop():
    draws = generator(3)
    probabilities = torch.rand(90, 4, generator=draws).softmax(dim=1)
    labels = torch.randint(0, 4, (90,), generator=draws)
    count = round(ANCHORS * 90 / 4)
    taken = round(OF_OTHERS * 3)
    for label, rate in enumerate(noise_rates(probabilities, labels)):
        shares = []
        for sure in range(4):
            if sure != label:
                anchors = sorted(range(90), key=lambda i, sure=sure: -float(probabilities[i, sure]))[:count]
                shares.append(sum(int(labels[i]) == label for i in anchors) / count)
        assert float(rate) == pytest.approx(max(sum(sorted(shares)[:taken]) / taken, FLOOR), abs=1e-6)


def test_probability_of_a_wrong_label_against_bayes_rule_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    found = wrong_label_probability(probabilities, labels, torch.tensor([0.01, 0.05, FLOOR]))
    expected = [0.3 * 0.01 / (0.7 + 0.3 * 0.01), 0.9 * 0.05 / (0.1 + 0.9 * 0.05), 0.0, 1.0]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("poisoned", [0.02, 0.05, 0.1])
def test_the_label_that_is_given_to_all_classes_is_found_with_its_rate(poisoned):
    features, given, true = make_overlapping(6000, 6, distance=2, poisoned=poisoned)
    rates = noise_rates(held_out_probabilities(features, given, 6, generator()), given)
    assert int(rates.argmax()) == 1
    assert 0.4 * poisoned < float(rates[1]) < 2 * poisoned
    assert float(rates[[0, 2, 3, 4, 5]].max()) < 0.25 * float(rates[1])
    assert int((given != true).sum()) > 0


def test_clean_labels_of_classes_that_look_alike_have_no_rate():
    features, given, _ = make_overlapping(6000, 6, distance=1.5, poisoned=0)
    rates = noise_rates(held_out_probabilities(features, given, 6, generator()), given)
    assert float(rates.max()) < 0.01


def test_where_classes_overlap_wrong_labels_stand_out_more_than_by_their_loss():
    features, given, true = make_overlapping(6000, 6, distance=1.5, poisoned=0.05)
    probabilities = held_out_probabilities(features, given, 6, generator())
    wrong = wrong_label_probability(probabilities, given, noise_rates(probabilities, given))
    loss = -probabilities[torch.arange(6000), given].log()
    by_rate, by_loss = (roc_auc_score(given != true, score) for score in (wrong, loss))
    assert by_rate > 0.95 > by_loss
