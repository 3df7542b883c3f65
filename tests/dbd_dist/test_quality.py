"""What the truth says about splits and features, against slow and obvious counterparts."""

from __future__ import annotations

import math

import pytest
import torch

from dbd_dist.evaluation.quality import feature_quality, split_quality


def draw(count: int = 60) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    poisoned = torch.arange(count) % 7 == 0
    losses = torch.rand(count, generator=generator) + 0.3 * poisoned
    labels = torch.randint(0, 3, (count,), generator=generator)
    labels[poisoned] = 2
    return losses, losses < losses.median(), poisoned, labels


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    losses, kept, poisoned, labels = draw()
    bad, good = losses[poisoned].tolist(), losses[~poisoned].tolist()
    pairs = [(b > g) + 0.5 * (b == g) for b in bad for g in good]
    assert split_quality(losses, kept, poisoned, labels)["auroc"] == pytest.approx(sum(pairs) / len(pairs))


def test_rates_count_who_loses_a_label():
    losses, kept, poisoned, labels = draw()
    found = split_quality(losses, kept, poisoned, labels)
    lost = [i for i in range(60) if not kept[i]]
    assert found["tpr"] == sum(bool(poisoned[i]) for i in lost) / int(poisoned.sum())
    assert found["fpr"] == sum(not poisoned[i] for i in lost) / (60 - int(poisoned.sum()))


def test_most_suspect_of_the_target_class_in_proportion_to_the_set():
    losses, kept, poisoned, labels = draw(5000)
    found = split_quality(losses, kept, poisoned, labels)["most_suspect"]
    ranked = sorted((i for i in range(5000) if labels[i] == 2), key=lambda i: -float(losses[i]))
    assert found == [[n, sum(bool(poisoned[i]) for i in ranked[:n]) / n] for n in (25, 50, 100)]


def test_a_split_of_clean_data_has_false_alarms_only():
    losses, kept, _, labels = draw()
    found = split_quality(losses, kept, torch.zeros(60, dtype=torch.bool), labels)
    assert found == {"auroc": None, "tpr": None, "fpr": int((~kept).sum()) / 60, "most_suspect": None}


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def test_features_against_a_loop():
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(3, 5, generator=generator)
    true = torch.arange(40) % 3
    features = centres[true] + 1.6 * torch.randn(40, 5, generator=generator)
    poisoned = torch.arange(40) % 8 == 0
    given = torch.where(poisoned, 1, true)
    test_labels = torch.arange(20) % 3
    test = centres[test_labels] + 1.6 * torch.randn(20, 5, generator=generator)
    found = feature_quality(features, given, true, poisoned, test, test_labels, neighbours=5)

    right = 0
    for image, label in zip(test, test_labels):
        benign = [j for j in range(40) if not poisoned[j]]
        nearest = sorted(benign, key=lambda j: -cosine(image, features[j]))[:5]
        votes = [sum(int(true[j]) == k for j in nearest) for k in range(3)]
        right += votes.index(max(votes)) == int(label)
    assert found["knn_acc"] == right / 20
    assert 0 < right < 20

    for name, labels in (("true", true), ("given", given)):
        shares = []
        for i in range(40):
            if poisoned[i]:
                others = [j for j in range(40) if j != i]
                nearest = sorted(others, key=lambda j: -cosine(features[i], features[j]))[:5]
                shares.append(sum(int(given[j]) == int(labels[i]) for j in nearest) / 5)
        assert found[f"poisoned_near_{name}"] == pytest.approx(sum(shares) / len(shares))


def test_features_of_clean_data_say_nothing_of_poisoned_samples():
    features, labels = torch.eye(6), torch.arange(6) % 2
    found = feature_quality(features, labels, labels, torch.zeros(6, dtype=torch.bool), features, labels, neighbours=1)
    assert found == {"knn_acc": 1.0, "poisoned_near_true": None, "poisoned_near_given": None}
