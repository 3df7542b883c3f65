"""What a defender measures, against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

from dbd_dist.config import override
from dbd_dist.evaluation import defender
from dbd_dist.launch.local import run_local
from dbd_dist.stages.mixmatch import withheld


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(3)
    logits, features = torch.randn(40, 4, generator=generator), torch.randn(40, 6, generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    kept, held = torch.rand(40, generator=generator) < 0.6, torch.rand(40, generator=generator) < 0.3
    return logits, features, labels, kept, held


def test_figures_are_those_of_loops(sample):
    logits, features, labels, kept, held = sample
    found = defender.figures(*sample)
    judged = [i for i in range(40) if kept[i] and held[i]]
    right = [i for i in judged if max(range(4), key=lambda k: float(logits[i, k])) == int(labels[i])]
    assert found["withheld_agreement"] == pytest.approx(len(right) / len(judged))

    losses = [math.log(sum(math.exp(float(x)) for x in logits[i])) - float(logits[i, labels[i]]) for i in range(40)]
    mean = sum(losses) / 40
    spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / 40)
    of_kept = [losses[i] for i in range(40) if kept[i]]
    dropped = [losses[i] for i in range(40) if not kept[i]]
    gap = (sum(dropped) / len(dropped) - sum(of_kept) / len(of_kept)) / spread
    assert found["loss_gap"] == pytest.approx(gap, abs=1e-5)

    places = [i for i in range(40) if kept[i]]
    agreeing = 0
    for i in places:
        others = sorted(
            (j for j in places if j != i),
            key=lambda j: -float(torch.cosine_similarity(features[i], features[j], dim=0)),
        )[:10]
        votes = [sum(int(labels[j]) == k for j in others) for k in range(4)]
        agreeing += votes.index(max(votes)) == int(labels[i])
    assert found["knn_agreement"] == pytest.approx(agreeing / len(places))


def test_nothing_withheld_and_nothing_dropped(sample):
    logits, features, labels, _, _ = sample
    every, nobody = torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)
    assert set(defender.figures(logits, features, labels, every, nobody)) == {"knn_agreement"}


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 24), (0.5, 120)])
def test_withheld_is_drawn_with_the_seed(share, count):
    first, again, other = (withheld(share, 240, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert int(first.sum()) == count
    assert torch.equal(first, again)
    assert share == 0 or not torch.equal(first, other)


@pytest.mark.slow
def test_a_run_reports_them_and_its_numbers_stay(smoke_config, tmp_path):
    """Measuring changes no number; withholding labels does."""
    fast = override(smoke_config, {"simclr.epochs": 1, "warmup.epochs": 1, "mixmatch.epochs": 3, "mixmatch.steps": 2})
    seen: list[dict] = []
    rows: dict[str, list[dict]] = {}
    for name, values in {
        "plain": {},
        "measured": {"compute.defender_metrics": True},
        "withheld": {"compute.defender_metrics": True, "mixmatch.withhold": 0.2},
    }.items():
        seen = []
        config = override(fast, values)
        run_local(config, storage=tmp_path, name=name, quiet=True, hook=lambda row, _, into=seen: into.append(row))
        rows[name] = [row for row in seen if row["stage"] == "mixmatch"]
    for plain, measured in zip(rows["plain"], rows["measured"], strict=True):
        assert measured["loss"] == plain["loss"]
        assert measured["kept_poisoned"] == plain["kept_poisoned"]
    assert rows["withheld"][-1]["loss"] != rows["plain"][-1]["loss"]
    assert rows["withheld"][0]["kept"] == rows["plain"][0]["kept"]
    assert not set(rows["plain"][-1]) & set(defender.METRICS)
    assert set(rows["measured"][-1]) & set(defender.METRICS) == set(defender.METRICS) - {"withheld_agreement"}
    assert set(defender.METRICS) <= set(rows["withheld"][-1])
    assert all(0 <= rows["withheld"][-1][name] <= 1 for name in defender.METRICS if name != "loss_gap")
