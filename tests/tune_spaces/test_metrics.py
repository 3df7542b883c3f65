"""What trials are judged by: directions, means, Pareto fronts, rank correlation."""

from __future__ import annotations

import itertools
import random

import pytest

from data_prep.errors import UserError
from dbd_dist.evaluation import defender
from tune_spaces import metrics
from tune_spaces.attack import on_the_way
from tune_spaces.metrics import Metric


def test_the_defender_measures_what_the_names_say():
    assert set(metrics.DEFENDER) == set(defender.METRICS)


def test_directions():
    assert metrics.find([], truth=True, attacks=False) == (Metric("score", True),)
    assert metrics.find([], truth=False, attacks=False) == (Metric("withheld_agreement", True),)
    assert metrics.find([], truth=True, attacks=True) == (Metric("asr", True),)
    assert metrics.find(["clean_acc", "asr"], truth=True, attacks=False) == (
        Metric("clean_acc", True),
        Metric("asr", False),
    )
    assert Metric("asr", False).signed({"asr": 0.25}) == -0.25
    assert Metric("asr", False).signed({}) is None
    assert Metric("asr", False).signed({"asr": float("nan")}) is None


@pytest.mark.parametrize(
    ("names", "truth", "attacks", "message"),
    [
        (["clean_ac"], True, False, "did you mean clean_acc"),
        (["psnr_db"], True, False, "no trial reports"),
        (["score"], False, False, "--truth none: score needs the truth"),
        (["clean_acc"], False, False, "needs the truth"),
        (["loss_gap"], True, True, "no trial reports"),
        (["asr", "asr"], True, False, "twice"),
    ],
)
def test_metrics_that_cannot_be(names, truth, attacks, message):
    with pytest.raises(UserError, match=message):
        metrics.find(names, truth=truth, attacks=attacks)


def test_how_far_an_attack_came_is_read_from_a_result():
    quality = {"first": {"auroc": 0.75, "tpr": 1.0}, "last": {"auroc": 0.5}}
    whole = {"asr": 0.0, "after_warmup": {"clean_acc": 0.9, "asr": 0.25}, "split_quality": quality}
    assert on_the_way(whole) == {"asr_warmup": 0.25, "first_auroc": 0.75}
    assert on_the_way({"asr": 1.0, "split_quality": None}) == {}  # no defence, or nobody knows the truth


def test_means_over_seeds():
    means, spread = metrics.mean([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}, {"a": 5.0}])
    assert means == {"a": 3.0}
    assert spread == {"a": 2.0}
    assert metrics.mean([{"a": 1.0}]) == ({"a": 1.0}, {})
    assert metrics.with_score({"clean_acc": 0.9, "asr": 0.25})["score"] == pytest.approx(0.65)
    assert metrics.with_score({"clean_acc": 0.9})["score"] == 0.9
    assert "score" not in metrics.with_score({"loss": 1.0})


def test_the_front_against_every_pair():
    drawn = random.Random(1)
    points = [(drawn.randint(0, 5), drawn.randint(0, 5)) for _ in range(30)]
    expected = []
    for i, (a, b) in enumerate(points):
        beaten = [(x, y) for x, y in points if x >= a and y >= b and (x > a or y > b)]
        if not beaten:
            expected.append(i)
    assert metrics.front(points) == expected
    assert metrics.front([]) == []


def test_rank_correlation_without_ties_by_its_formula():
    first, second = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 7.0, 1.0, 8.0, 2.5]
    rank = lambda values: [sorted(values).index(v) for v in values]  # noqa: E731
    d2 = sum((a - b) ** 2 for a, b in zip(rank(first), rank(second)))
    assert metrics.rank_correlation(zip(first, second)) == pytest.approx(1 - 6 * d2 / (5 * (25 - 1)))
    assert metrics.rank_correlation([]) is None
    assert metrics.rank_correlation(itertools.repeat((1.0, 2.0), 5)) is None


def test_proxies_are_held_against_the_score_of_finished_trials():
    rows = [
        {"status": "finished", "metrics": {"score": s, "loss_gap": g}} for s, g in ((0.1, 1.0), (0.2, 2.0), (0.3, 3.0))
    ]
    rows += [{"status": "stopped", "metrics": {"score": 0.9, "loss_gap": -5.0}}, {"status": "failed", "metrics": {}}]
    assert metrics.proxies(rows) == {"loss_gap": (3, pytest.approx(1.0))}
