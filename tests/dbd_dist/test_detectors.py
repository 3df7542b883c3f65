"""Methods that flag suspect training samples: each against loops, and what a run leaves of what was flagged."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from dbd_dist.config import override
from dbd_dist.data import augment
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.evaluation.evaluator import Evaluator
from dbd_dist.launch.local import run_local
from dbd_dist.presets import preset
from dbd_dist.runtime.keys import stage_keys
from dbd_dist.stages import Clustering, Retrain, Spectral
from dbd_dist.stages.detector import class_features
from dbd_dist.stages.flagged import flag
from dbd_dist.stages.isolation import fraction_of, local_gradient_ascent


def blobs(sizes: tuple[int, ...], apart: float, dims: int = 5) -> Tensor:
    """Clouds of points along the first axis."""
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [torch.randn(n, dims, generator=generator) + apart * k * torch.eye(dims)[0] for k, n in enumerate(sizes)]
    return torch.cat(parts).float()


# -- spectral signatures


def test_scores_are_squared_projections_on_the_main_direction():
    """The main direction by power iteration, sum by sum."""
    points = blobs((12, 4), 5.0, dims=3).double().tolist()
    mean = [sum(p[d] for p in points) / len(points) for d in range(3)]
    centred = [[p[d] - mean[d] for d in range(3)] for p in points]
    direction = [1.0, 1.0, 1.0]
    for _ in range(500):
        along = [sum(a * b for a, b in zip(row, direction)) for row in centred]
        direction = [sum(s * row[d] for s, row in zip(along, centred)) for d in range(3)]
        length = math.sqrt(sum(d * d for d in direction))
        direction = [d / length for d in direction]
    expected = [sum(a * b for a, b in zip(row, direction)) ** 2 for row in centred]
    found = Spectral().examine(torch.tensor(points), seed=0)
    assert found.scores is not None
    np.testing.assert_allclose(found.scores.tolist(), expected, rtol=1e-9)
    highest = sorted(range(16), key=lambda i: -expected[i])[: round(1.5 * 0.1 * 16)]
    assert set(torch.nonzero(found.samples).flatten().tolist()) == set(highest)
    assert set(highest) <= set(range(12, 16))


@pytest.mark.parametrize(("count", "rate", "flagged"), [(20, 0.1, 3), (20, 0.2, 6), (4, 0.9, 3), (1, 0.5, 0)])
def test_one_and_a_half_times_the_expected_rate_is_flagged(count, rate, flagged):
    assert int(Spectral(expected_rate=rate).examine(blobs((count,), 0.0), seed=0).samples.sum()) == flagged


# -- activation clustering


def best_bisection(points: list[list[float]]) -> frozenset[int]:
    """The smaller part of the split in two with the least squared distance to the means, of all there are."""

    def spread(part: tuple[int, ...]) -> float:
        means = [sum(points[i][d] for i in part) / len(part) for d in range(len(points[0]))]
        return sum((points[i][d] - m) ** 2 for i in part for d, m in enumerate(means))

    everyone = range(len(points))
    parts = [part for size in range(1, len(points) // 2 + 1) for part in itertools.combinations(everyone, size)]
    return frozenset(min(parts, key=lambda p: spread(p) + spread(tuple(i for i in everyone if i not in p))))


def silhouette(points: list[list[float]], part: frozenset[int]) -> float:
    """The mean over all points of (b - a) / max(a, b): mean distances to one's own and to the other cluster."""
    total = 0.0
    for i, here in enumerate(points):
        own = [j for j in range(len(points)) if (j in part) == (i in part) and j != i]
        other = [j for j in range(len(points)) if (j in part) != (i in part)]
        a, b = (sum(math.dist(here, points[j]) for j in group) / max(len(group), 1) for group in (own, other))
        total += (b - a) / max(a, b) if own else 0.0
    return total / len(points)


@pytest.mark.parametrize("apart", [6.0, 0.0])
def test_clusters_by_trying_every_split(apart):
    """Whole rank, so that PCA only turns the points."""
    features = blobs((9, 4), apart, dims=3)
    smaller = best_bisection(features.double().tolist())
    score = silhouette(features.double().tolist(), smaller)
    stage = Clustering(reduce="pca", dims=3)
    below = replace(stage, silhouette=score - 1e-6).examine(features, seed=0)
    assert set(torch.nonzero(below.samples).flatten().tolist()) == smaller
    assert below.is_target
    assert below.score == pytest.approx(score, abs=1e-9)
    above = replace(stage, silhouette=score + 1e-6).examine(features, seed=0)
    assert not above.samples.any()
    assert above.is_target is False


def test_the_rule_by_size():
    features = blobs((30, 10), 12.0)
    assert Clustering(rule="size", size=0.26).examine(features, seed=0).samples.tolist() == [False] * 30 + [True] * 10
    assert not Clustering(rule="size", size=0.24).examine(features, seed=0).samples.any()


def test_ica_finds_a_poisoned_class_and_leaves_a_clean_one():
    assert Clustering().examine(blobs((150, 60), 12.0, dims=20), seed=0).samples.tolist() == [False] * 150 + [True] * 60
    assert not Clustering().examine(blobs((200,), 0.0, dims=20), seed=0).samples.any()


@pytest.mark.parametrize("features", [torch.ones(9, 4), torch.rand(1, 4), torch.rand(2, 4), torch.rand(3, 4)])
def test_classes_with_nothing_to_cluster(features):
    found = Clustering(silhouette=1.0).examine(features, seed=0)
    assert not found.samples.any()
    assert found.is_target is False


# -- features


def test_features_of_every_class_are_those_of_its_images(alone):
    images = tiny.make_images()
    context = tiny.make_context(alone, images)
    model = tiny.make_classifier(context).eval()
    seen = []
    for label, positions, features in class_features(model, context, batch=5):
        for position, feature in zip(positions.tolist(), features):
            assert images.labels[position] == label
            pixels = next(images.batches([torch.tensor([position])]))
            with torch.no_grad():
                expected = model.backbone(augment.normalise(context.normalise, pixels))[0]
            torch.testing.assert_close(feature, expected)
        seen += positions.tolist()
    assert sorted(seen) == list(range(len(images)))


@pytest.mark.slow
@pytest.mark.parametrize("detector", tiny.DETECTORS)
def test_two_ranks_flag_what_one_does(alone, two_ranks, detector):
    expected = tiny.detect(alone, detector)
    for found in two_ranks(tiny.detect, detector):
        assert found["samples"].tolist() == expected["samples"].tolist()
        assert (found["classes"] is None) == (detector == "spectral")
    assert expected["samples"].any()


@pytest.mark.slow
def test_two_ranks_isolate_what_one_does(alone, two_ranks):
    expected = tiny.isolate(alone)
    assert int(expected["samples"].sum()) == 5
    for found in two_ranks(tiny.isolate):
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4)
        assert found["samples"].tolist() == expected["samples"].tolist()


# -- anti-backdoor learning


def test_gradient_ascent_below_gamma_by_hand():
    logits, labels = torch.tensor([[0.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0, 1])
    logits.requires_grad_()
    losses = [math.log(1 + math.exp(-4)), math.log(2), math.log(1 + math.exp(1))]
    expected = (-losses[0] + losses[1] + losses[2]) / 3
    loss = local_gradient_ascent(0.5, logits, labels)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] > 0  # descent makes the sample below gamma less sure, and the others surer
    assert logits.grad[1, 0] < 0
    assert logits.grad[2, 1] < 0


def test_isolated_samples_have_the_lowest_loss(alone):
    context = replace(tiny.make_context(alone, tiny.make_images()), model=tiny.MODEL)
    stage = tiny.Isolation(epochs=1, batch=24, share=0.1, augment=tiny.WEAK)
    given = stage.run(context, {}, None)
    model = tiny.make_classifier(context)
    model.load_state_dict(given["model"])
    model.eval()
    pixels = next(context.images.batches([torch.arange(48)]))
    with torch.no_grad():
        logits = model(augment.normalise(context.normalise, pixels))
    losses = F.cross_entropy(logits, context.images.labels, reduction="none")
    torch.testing.assert_close(given["flagged"]["scores"], -losses)
    lowest = sorted(range(48), key=lambda i: losses[i].item())[:5]
    assert sorted(lowest) == torch.nonzero(given["flagged"]["samples"]).flatten().tolist()


@pytest.mark.parametrize("bound", [20.0, 1e-3])
def test_a_step_of_unlearning_by_hand(alone, bound):
    """Descent on the others, ascent on the isolated that have not come to the bound; batch norm keeps its
    statistics."""
    rows: list[dict[str, float]] = []
    context = tiny.make_context(alone, tiny.make_images(), report=lambda end: rows.append(end.metrics))
    config = replace(
        tiny.UNLEARNING, steps=1, batch=48, momentum=0.0, weight_decay=0.0, bound=bound, augment=augment.none()
    )  # both kinds are drawn in whole passes: 41 others and 7 once more, 7 isolated ones almost seven times each
    drawn = context.generator("unlearning", 1, "order")
    everyone = torch.arange(48)
    others, isolated = everyone[everyone % 7 != 0], everyone[everyone % 7 == 0]
    orders = []
    for kind in (others, isolated):
        passes = [kind[torch.randperm(len(kind), generator=drawn)] for _ in range(-(-48 // len(kind)))]
        orders.append(torch.cat(passes)[:48])
    model, twin = tiny.make_classifier(context), tiny.make_classifier(context)
    tiny.run_unlearning(config, context, model)
    twin.eval()
    losses = []
    for order in orders:
        pixels = augment.normalise(context.normalise, next(context.images.batches([order])))
        losses.append(F.cross_entropy(twin(pixels), context.images.labels[order]))
    (losses[0] - losses[1] if bound > 1 else losses[0]).backward()
    for (name, after), before in zip(model.named_parameters(), twin.parameters()):
        assert before.grad is not None
        torch.testing.assert_close(after, before - config.lr * before.grad, msg=name)
    for (name, after), before in zip(model.named_buffers(), twin.buffers()):
        assert torch.equal(after, before), name
    assert rows[0]["loss_others"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert rows[0]["loss_isolated"] == pytest.approx(min(losses[1].item(), bound), rel=1e-5)


@pytest.mark.slow
def test_unlearning_ends_however_long_it_goes_on(alone):
    context = tiny.make_context(alone, tiny.make_images())
    model = tiny.make_classifier(context)
    tiny.run_unlearning(replace(tiny.UNLEARNING, steps=400, lr=0.005), context, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_parts_of_an_epoch_budget():
    """Of the paper's 100 epochs 20, then 60; and the authors' 5 of unlearning."""
    assert [fraction_of(100, share, at_most=most) for share, most in ((0.2, 20), (0.6, 60))] == [20, 60]
    assert fraction_of(200, 0.2, at_most=20) == 20
    assert fraction_of(2, 0.2, at_most=20) == 1
    demo = preset("demo").config("abl").method.stages()
    assert [stage.epochs for stage in demo] == [6, 18, 5]  # type: ignore[attr-defined]


# -- training again


def test_flagged_samples_are_never_looked_at(alone):
    asked: set[int] = set()

    class Watched(ResidentImages):
        def batches(self, positions):
            for chosen in positions:
                asked.update(chosen.tolist())
                yield from super().batches([chosen])

    images = tiny.make_images()
    watched = Watched(images._images, images.labels)
    context = replace(tiny.make_context(alone, watched), model=tiny.MODEL)
    flagged = torch.zeros(48, dtype=torch.bool)
    flagged[::3] = True
    stage = Retrain(epochs=6, batch=16, augment=tiny.WEAK)
    stage.run(context, {"flagged": flag(samples=flagged)}, None)
    assert asked == {i for i in range(48) if i % 3}
    with pytest.raises(UserError, match="32 of 48 samples are left after detection, fewer than a batch"):
        replace(stage, batch=33).run(context, {"flagged": flag(samples=flagged)}, None)


# -- what was flagged, held against the truth


def test_rates_of_what_was_flagged_by_counting(alone, digits):
    dataset = open_dataset(digits)
    poisoned = read_truth(digits)["train"].poisoned.tolist()
    labels = ResidentImages.read(dataset, torch.device("cpu")).labels
    scores = torch.rand(240, generator=torch.Generator().manual_seed(0)) + torch.tensor(poisoned) * 0.5
    samples = scores > 0.8
    evaluator = Evaluator(dataset, alone, augment.none(), bf16=False)
    target = {int(labels[i]) for i in range(240) if poisoned[i]}
    assert len(target) == 1
    classes = torch.tensor([*target, (next(iter(target)) + 1) % 10])
    found = evaluator.count_flagged(flag(samples=samples, scores=scores, classes=classes), labels)
    hits = sum(bool(s) and p for s, p in zip(samples, poisoned))
    alarms = sum(bool(s) and not p for s, p in zip(samples, poisoned))
    pairs = [scores[i] > scores[j] for i in range(240) if poisoned[i] for j in range(240) if not poisoned[j]]
    assert found["samples"] == hits + alarms
    assert found["tpr"] == pytest.approx(hits / sum(poisoned))
    assert found["fpr"] == pytest.approx(alarms / (240 - sum(poisoned)))
    assert found["auroc"] == pytest.approx(sum(map(bool, pairs)) / len(pairs))
    suspects = sorted((i for i in range(240) if int(labels[i]) in target), key=lambda i: -float(scores[i]))
    counts = (1, 2, 5)  # of 240, as 250, 500, 1,000 of 50,000
    shares = [[n, sum(poisoned[i] for i in suspects[:n]) / n] for n in counts]
    assert found["most_suspect"] == shares
    assert (found["classes"], found["class_tpr"], found["class_fpr"]) == (classes.tolist(), 1.0, 1 / 9)
    nothing = evaluator.count_flagged(flag(), labels)
    assert set(nothing.values()) == {None}


# -- whole runs


def smoke(method: str, data: Path, **settings: Any) -> Any:
    config = preset("smoke").config(method)
    compute = {"compute.workers": 1, "compute.threads": 1, "compute.precision": "fp32"}
    return override(replace(config, data=data), compute | settings)


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def train(config: Any, storage: Path) -> dict[str, Any]:
    result = run_local(config, storage=storage, name=config.method.name, quiet=True)
    assert result is not None
    return result


@pytest.mark.slow
def test_runs_share_plain_training_and_say_what_was_flagged(storage, digits):
    first = train(smoke("spectral", digits), storage)
    second = train(smoke("activation-clustering", digits, **{"clustering.silhouette": -1.0}), storage)
    assert first["reused_stages"] == []
    assert second["reused_stages"] == ["supervised"]
    assert first["seconds"].keys() == {"supervised", "spectral", "retrain"}
    poisoned = read_truth(digits)["train"].poisoned
    for result, name in ((first, "spectral"), (second, "activation-clustering")):
        table = pq.read_table(storage / name / "flagged.parquet").to_pydict()
        marked = np.array(table["flagged"])
        assert table["index"] == list(range(240))
        assert result["flagged"]["samples"] == marked.sum() > 0
        assert result["flagged"]["tpr"] == pytest.approx((marked & poisoned).sum() / poisoned.sum())
        assert result["flagged"]["fpr"] == pytest.approx((marked & ~poisoned).sum() / (~poisoned).sum())
    assert second["flagged"]["classes"] == list(range(10))
    rows = [json.loads(line) for line in (storage / "spectral" / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["supervised"] * 2 + ["spectral"] + ["retrain"] * 2
    assert rows[2]["flagged"] == first["flagged"]["samples"]
    assert first["clean_acc"] == rows[-1]["clean_acc"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "stage"),
    [
        ("spectral", "spectral"), ("activation-clustering", "clustering"), ("nc", "inversion"), ("nad", "teacher"),
        ("abl", "isolation"), ("abl", "finetuning"),
    ],
)  # fmt: skip
def test_any_stage_is_taken_over_by_another_run(method, stage, with_holdout, tmp_path):
    """Detectors report no loss, others no rate: what they leave has to be taken for a state all the same."""
    config = smoke(method, with_holdout)
    if method == "nc":
        config = override(config, {"inversion.rounds": 2, "patching.batch": 10})
    assert run_local(replace(config, stop_after=stage), storage=tmp_path, name="part", quiet=True) is None
    found = run_local(config, storage=tmp_path, name="rest", quiet=True)
    whole = run_local(config, storage=tmp_path / "apart", name="whole", quiet=True)
    assert found is not None
    assert whole is not None
    assert stage in found["reused_stages"]
    for name in ("clean_acc", "asr", "flagged", "images"):
        assert found.get(name) == whole.get(name), name


def test_anti_backdoor_learning_runs(storage, digits):
    result = train(smoke("abl", digits, **{"unlearning.epochs": 2}), storage)
    assert result["seconds"].keys() == {"isolation", "finetuning", "unlearning"}
    assert result["flagged"]["samples"] == 2
    assert 0 <= result["flagged"]["auroc"] <= 1


def test_plain_training_has_one_key(digits, smoke_none):
    keys = {
        name: stage_keys(smoke(name, digits), open_dataset(digits), bf16=False)
        for name in ("none", "spectral", "activation-clustering")
    }
    assert len({key["supervised"] for key in keys.values()}) == 1
    assert keys["spectral"]["retrain"] != keys["activation-clustering"]["retrain"]
