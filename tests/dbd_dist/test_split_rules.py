"""Rules that decide which samples keep their labels, against slow and obvious counterparts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from data_prep.errors import UserError
from dbd_dist.data import augment, sampling
from dbd_dist.data.split_rules import (
    class_quota,
    keep_balanced,
    keep_mixture,
    keep_trusted,
    neighbour_distance,
    neighbour_votes,
    valley,
)
from dbd_dist.presets import preset
from dbd_dist.stages import Split, mixmatch, split
from tests.dbd_dist import tiny


def make_labels(*sizes: int) -> torch.Tensor:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("sizes", [(10, 10, 10), (3, 30, 7), (0, 5, 50), (1, 1, 1), (40, 2, 2)])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.85, 0.99])
def test_quota_is_the_largest_equal_count_within_the_fraction(sizes, fraction):
    wanted = round(fraction * sum(sizes))
    fitting = [c for c in range(1, max(sizes) + 1) if sum(min(c, size) for size in sizes) <= wanted]
    assert class_quota(make_labels(*sizes), len(sizes), fraction) == max(fitting, default=1)


def test_balanced_keeps_the_lowest_losses_of_every_class():
    labels = make_labels(8, 20, 5)
    losses = torch.rand(33, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # with ties
    kept = keep_balanced(losses, labels, 3, 0.5)
    for label in range(3):
        own = sorted((float(losses[i]), i) for i in range(33) if labels[i] == label)
        assert {i for i in range(33) if kept[i] and labels[i] == label} == {i for _, i in own[:5]}


def test_balanced_keeps_no_more_of_a_class_that_poisoned_samples_swell():
    labels = make_labels(100, 100, 170)
    assert torch.bincount(labels[keep_balanced(torch.rand(370), labels, 3, 0.6)]).tolist() == [74, 74, 74]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.9])
def test_trusted_keeps_as_many_of_every_class_as_may_be_expected_wrong(share):
    labels = make_labels(30, 60, 10)
    wrong = torch.rand(100, generator=torch.Generator().manual_seed(8)) ** 3
    kept = keep_trusted(wrong, labels, 3, 0.2, 0.7, share)
    low, high = (class_quota(labels, 3, fraction) for fraction in (0.2, 0.7))
    for label in range(3):
        own = sorted((float(wrong[i]), i) for i in range(100) if labels[i] == label)
        most = max((n for n in range(1, len(own) + 1) if sum(w for w, _ in own[:n]) / n <= share), default=0)
        count = min(max(most, low), high)
        assert {i for i in range(100) if kept[i] and labels[i] == label} == {i for _, i in own[:count]}


def two_heaps(low: int, high: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(low, generator=generator) * 0.3 + 1, torch.randn(high, generator=generator) + 8])


def test_mixture_keeps_the_lower_heap_of_each_class():
    labels = torch.cat([torch.zeros(100), torch.ones(100)]).long()
    losses = torch.cat([two_heaps(90, 10), two_heaps(60, 40, seed=1)])
    kept = keep_mixture(losses, labels, 2, 0.5, 0.95)
    assert torch.equal(kept, losses < 4)


@pytest.mark.parametrize(("low", "expected"), [(20, 50), (99, 90), (70, 70)])
def test_mixture_stays_between_its_bounds(low, expected):
    losses = two_heaps(low, 100 - low)
    kept = keep_mixture(losses, torch.zeros(100).long(), 1, 0.5, 0.9)
    assert torch.equal(kept.nonzero().flatten().sort().values, losses.argsort()[:expected].sort().values)


def test_valley_is_where_the_densities_of_a_known_mixture_cross():
    """Large samples of N(0, 1) and N(6, 1), equally many: the densities cross half-way."""
    generator = torch.Generator().manual_seed(3)
    sample = torch.cat(
        [torch.randn(20_000, generator=generator), torch.randn(20_000, generator=generator) + 6]
    ).double()
    assert valley(sample) == pytest.approx(3.0, abs=0.05)


def test_valley_of_equal_and_of_single_losses_keeps_all():
    assert valley(torch.full((5,), 2.0).double()) == 2.0
    assert valley(torch.tensor([0.5]).double()) == 0.5


@pytest.mark.parametrize("chunk", [3, 1000])
def test_votes_of_neighbours_against_a_loop(chunk):
    generator = torch.Generator().manual_seed(4)
    features, labels = torch.randn(25, 6, generator=generator), torch.randint(0, 3, (25,), generator=generator)
    votes = neighbour_votes(features, labels, 3, 4, chunk=chunk)

    def dot(i: int, j: int) -> float:
        return float(features[i] @ features[j])

    for i in range(25):
        cosine = {
            j: float(features[i] @ features[j])
            / math.sqrt(float(features[i] @ features[i] * (features[j] @ features[j])))
            for j in range(25)
            if j != i
        }
        nearest = sorted(cosine, key=lambda j: -cosine[j])[:4]
        assert votes[i].tolist() == [sum(int(labels[j]) == k for j in nearest) / 4 for k in range(3)]


@pytest.mark.parametrize("chunk", [3, 1000])
def test_distance_to_neighbours_against_a_loop(chunk):
    features = torch.randn(25, 6, generator=torch.Generator().manual_seed(4))
    unit = [f / f.norm() for f in features]
    for i, found in enumerate(neighbour_distance(features, 7, chunk=chunk)):
        others = sorted((float(unit[i] @ unit[j]) for j in range(25) if j != i), reverse=True)
        assert float(found) == pytest.approx(1 - sum(others[:7]) / 7, abs=1e-6)


def test_a_small_group_of_its_own_is_far_from_others_and_a_large_one_is_not():
    generator = torch.Generator().manual_seed(5)
    groups = [torch.eye(8)[k] + 0.1 * torch.randn(size, 8, generator=generator) for k, size in enumerate((80, 80, 8))]
    far = neighbour_distance(torch.cat(groups), neighbours=25)
    assert far[160:].min() > 5 * far[:160].max()


def test_left_out_samples_are_neither_kept_nor_drawn_without_labels(alone, monkeypatch):
    drawn: list[torch.Tensor] = []
    cycling = sampling.cycling_batches
    for module in (sampling, mixmatch):
        monkeypatch.setattr(module, "cycling_batches", lambda p, *rest: drawn.append(p) or cycling(p, *rest))
    context = tiny.make_context(alone, tiny.make_images())
    rule = replace(tiny.SPLIT, leave_out=0.25, rule="balanced")
    model = tiny.make_classifier(context)
    _, found = mixmatch.fine_tune(tiny.MIXMATCH, rule, tiny.SAMPLE_LOSS, model, None, context, None)
    assert int(found["left_out"].sum()) == 12
    assert not (found["kept"] & found["left_out"]).any()
    labelled, unlabelled = map(set, (positions.tolist() for positions in drawn))
    assert labelled == set(found["kept"].nonzero().flatten().tolist())
    assert labelled | unlabelled == set((~found["left_out"]).nonzero().flatten().tolist())


def test_left_out_samples_come_back_when_the_network_knows_more(alone, monkeypatch):
    drawn: list[torch.Tensor] = []
    cycling = mixmatch.cycling_batches
    monkeypatch.setattr(mixmatch, "cycling_batches", lambda p, *rest: drawn.append(p) or cycling(p, *rest))
    context = tiny.make_context(alone, tiny.make_images())
    rule = replace(tiny.SPLIT, leave_out=0.25, leave_out_until=0.5, rule="balanced")
    config = replace(tiny.MIXMATCH, epochs=4, steps=1)
    _, found = mixmatch.fine_tune(config, rule, tiny.SAMPLE_LOSS, tiny.make_classifier(context), None, context, None)
    there = len(context.images)
    unlabelled = [len(positions) for positions in drawn]
    assert unlabelled[0] == unlabelled[1] < unlabelled[2] == unlabelled[3] == there - int(found["kept"].sum())
    assert "left_out" not in found


@pytest.mark.parametrize("draw", ["uniform", "balanced"])
def test_fine_tuning_draws_classes_as_it_is_told(alone, draw):
    images = tiny.make_images(60)
    images.labels = (torch.arange(60) >= 50).long()
    rule = replace(tiny.SPLIT, keep=0.9)
    seen: list[int] = []

    class Watched(type(images)):
        def batches(self, chunks):
            chunks = list(chunks)
            seen.extend(int(i) for chunk in chunks for i in chunk[: len(chunk) // 2])
            return super().batches(chunks)

    context = tiny.make_context(alone, images)
    model = tiny.make_classifier(context)
    kept = mixmatch.renew({}, rule, tiny.SAMPLE_LOSS, model, context, 1)["kept"]
    images.__class__ = Watched
    mixmatch.fine_tune(replace(tiny.MIXMATCH, draw=draw, epochs=1, steps=20), rule, tiny.SAMPLE_LOSS, model, None,
                       context, None)  # fmt: skip
    labelled = [int(images.labels[i]) for i in seen if kept[i]]
    share = sum(labelled) / len(labelled)
    expected = 0.5 if draw == "balanced" else float(images.labels[kept].float().mean())
    assert abs(share - expected) < 0.05


def test_scores_of_the_split(alone):
    images = tiny.make_images(37)
    images.labels = images.labels[torch.randperm(37, generator=torch.Generator().manual_seed(6))]  # disagreement
    context = tiny.make_context(alone, images)
    model = tiny.make_classifier(context)

    def scores(score: str) -> torch.Tensor:
        return split.measure_losses(replace(tiny.SPLIT, score=score, neighbours=3), tiny.SAMPLE_LOSS, model, context, 1)

    by_loss, by_neighbours, by_both = map(scores, ("loss", "neighbours", "both"))
    torch.testing.assert_close(by_both, (by_loss + by_neighbours) / 2)
    # SCE sees what share votes for the given label: 0, 1, 2 or 3 of 3 of them; more votes, a lower score
    draws = context.generator("split", 1, "augment")
    params = augment.draw(tiny.SPLIT.augment, 37, height=16, width=16, generator=draws)
    with torch.no_grad():
        pixels = next(images.batches([torch.arange(37)]))
        features = model.eval().backbone(augment.apply(tiny.SPLIT.augment, pixels, params))
    votes = neighbour_votes(features, images.labels, tiny.CLASSES, 3)
    for_given = votes[torch.arange(37), images.labels]
    order = by_neighbours.argsort()
    assert len(for_given.unique()) > 2
    assert torch.equal(for_given[order], for_given.sort(descending=True).values)


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        ("balanced", "neighbours"),
        ("balanced", "both"),
        ("mixture", "neighbours"),
        ("mixture", "both"),
        ("balanced", "label-noise"),
        ("trusted", "label-noise"),
    ],
)
def test_rules_and_scores_on_two_ranks(alone, two_ranks, rule, score):
    for found in two_ranks(tiny.kept_by, rule, score):
        assert torch.equal(torch.as_tensor(found), tiny.kept_by(alone, rule, score))


def test_rates_of_label_noise_are_those_of_the_first_split(alone):
    """A network that learnt the kept labels is surest of them: among its anchors no dropped label is left."""
    context = tiny.make_context(alone, tiny.make_images(60))
    rule = replace(tiny.SPLIT, score="label-noise", rule="trusted", keep=0.3)
    model = tiny.make_classifier(context)
    first = mixmatch.renew({}, rule, tiny.SAMPLE_LOSS, model, context, 1)
    with torch.no_grad():
        model.head.weight.add_(torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(1)))
    second = mixmatch.renew(first, rule, tiny.SAMPLE_LOSS, model, context, 2)
    assert torch.equal(second["noise_rate"], first["noise_rate"])
    assert torch.equal(second["first_loss"], first["loss"])
    logits = split.measure(rule, tiny.SAMPLE_LOSS, model, context, 2, features=True).logits_NK
    own = logits.softmax(dim=1)[torch.arange(60), context.images.labels]
    rate = first["noise_rate"]
    torch.testing.assert_close(second["loss"], (1 - own) * rate / (own + (1 - own) * rate))


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="the rule trusted does not know"):
        Split(rule="trusted")
    with pytest.raises(UserError, match="keep_most is"):
        Split(rule="trusted", score="label-noise", keep=0.8, keep_most=0.7)
    with pytest.raises(UserError, match="keep_most is"):
        Split(rule="mixture", keep=0.8, keep_most=0.7)
    assert Split(rule="balanced", keep=0.95, keep_most=0.7).bounds() == (0.95, 0.95)


def test_new_fields_leave_the_keys_of_the_published_split_as_they_were():
    assert set(Split().key_values()) == {"keep", "augment", "batch"}
    assert Split(rule="balanced").key_values() != Split().key_values()
    robust = preset("demo").config("dbd-robust").method.split
    published = Split(keep=0.3, rule="trusted", score="label-noise", scan=True, leave_out=0.1, leave_out_until=0.5,
                      augment=robust.augment)  # fmt: skip
    assert robust.key_values() == published.key_values() | {"keep_most": 0.9}
    assert robust.augment == preset("demo").config("dbd").method.split.augment


QUARTER = {"epochs": 20, "lr_schedule": "cosine"}


@pytest.mark.parametrize(("name", "shorter"), [("demo", {}), ("cifar10_cpu", {}), ("imagenet_subset_badnets", QUARTER)])
def test_variants_of_a_stage_take_the_settings_of_the_preset_but_for_their_own(name, shorter):
    robust, plain = (preset(name).config(method).method for method in ("dbd-robust", "dbd"))
    own_values = {"draw": "balanced"} | shorter
    assert robust.mixmatch == type(robust.mixmatch)(**vars(plain.mixmatch) | own_values)
    assert robust.mixmatch.key_values() == plain.mixmatch.key_values() | own_values
    own = {"keep", "keep_most", "rule", "score", "scan", "leave_out", "leave_out_until"}
    assert {f for f in vars(plain.split) if getattr(robust.split, f) != getattr(plain.split, f)} == own - {"keep_most"}
