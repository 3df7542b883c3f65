from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.attacks import AdapPatch, BadNets, NoAttack, Sig, WaNet
from data_prep.errors import UserError
from data_prep.plan import check_rate, check_target, choose_poisoned, draw_plan


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(20, 400),
    k=st.integers(2, 12),
    rate=st.floats(0.05, 0.4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_count_is_exact_and_target_is_spared(n, k, rate, seed, data):
    labels = np.arange(n) % k
    target = data.draw(st.integers(0, k - 1))
    mask = choose_poisoned(labels, rate=rate, target=target, num_classes=k, seed=seed)
    assert mask.dtype == bool
    assert mask.shape == (n,)
    assert sum(1 for hit in mask if hit) == int(rate * n + 0.5)
    assert all(labels[i] != target for i in range(n) if mask[i])


@pytest.mark.parametrize(
    ("n", "rate", "count"), [(50_000, 0.05, 2500), (10, 0.25, 3), (30, 0.05, 2), (1000, 0.0005, 1)]
)
def test_rounds_to_the_nearest_halves_up(n, rate, count):
    labels = np.arange(n) % 10
    assert choose_poisoned(labels, rate=rate, target=0, num_classes=10, seed=0).sum() == count


def test_depends_on_the_seed_and_on_nothing_else():
    labels = np.arange(1000) % 10
    first = choose_poisoned(labels, rate=0.1, target=3, num_classes=10, seed=1)
    np.random.seed(5)  # noqa: NPY002 - the global generator must make no difference
    again = choose_poisoned(labels, rate=0.1, target=3, num_classes=10, seed=1)
    other = choose_poisoned(labels, rate=0.1, target=3, num_classes=10, seed=2)
    assert (first == again).all()
    assert (first != other).any()


def test_all_eligible_samples_are_equally_likely():
    labels = np.arange(20) % 4
    hits = sum(choose_poisoned(labels, rate=0.25, target=0, num_classes=4, seed=s) for s in range(3000))
    assert (hits[labels == 0] == 0).all()
    assert np.abs(hits[labels != 0] / 3000 - 5 / 15).max() < 0.04  # five standard deviations


def test_eligible_mask_overrides_the_default():
    labels = np.arange(100) % 10
    mask = choose_poisoned(labels, rate=0.05, target=3, num_classes=10, seed=0, eligible=labels == 3)
    assert mask.sum() == 5
    assert set(labels[mask]) == {3}


@pytest.mark.parametrize(
    ("rate", "says"),
    [(0, "no attack"), (5, "0.05"), (5.0, "5 % say 0.05"), (-0.1, "out of range"), (1, "out of range")],
)
def test_rate_out_of_range(rate, says):
    with pytest.raises(UserError, match="strictly between 0 and 1") as error:
        check_rate(rate)
    assert says in str(error.value)


@pytest.mark.parametrize("rate", ["5", "0.05", None, True, float("nan"), float("inf")])
def test_rate_is_no_number(rate):
    with pytest.raises(UserError, match="rate"):
        check_rate(rate)


def test_rate_above_what_the_classes_hold():
    labels = np.array([3] * 80 + [1] * 20)
    assert choose_poisoned(labels, rate=0.2, target=3, num_classes=4, seed=0).sum() == 20
    with pytest.raises(UserError, match=r"30 of 100 images, only 20 can be poisoned.*at most 0\.2"):
        choose_poisoned(labels, rate=0.3, target=3, num_classes=4, seed=0)


def test_rate_too_low_for_one_image():
    with pytest.raises(UserError, match="less than one image"):
        choose_poisoned(np.arange(100) % 10, rate=0.001, target=3, num_classes=10, seed=0)


@pytest.mark.parametrize("target", [-1, 3, 99, "cat", True, None])
def test_target_is_not_a_class(target):
    with pytest.raises(UserError, match=r"not a class.*0 to 2 \(0 cat, 1 dog, 2 emu\)"):
        check_target(target, ["cat", "dog", "emu"])


# -------------------------------------------------------------------------------- the whole plan


@pytest.mark.parametrize("attack", [BadNets(), BadNets(mapping="all-to-all"), WaNet(), Sig(), AdapPatch()])
def test_a_plan_against_a_loop(attack, rng):
    labels = rng.integers(0, 5, 300)
    images = rng.integers(0, 256, (300, 16, 16, 3), dtype=np.uint8)
    before = labels.copy()
    plan = draw_plan(labels, attack, rate=0.1, target=2, num_classes=5, seed=7)
    assert plan.poisoned.sum() == 30
    assert plan.cover.sum() == round(30 * attack.covers_per_poisoned)
    assert plan.label_map == ((1, 2, 3, 4, 0) if not attack.has_target else (2,) * 5)
    poison, cover, apply = attack.train_trigger(16), attack.cover_trigger(16), plan.train_trigger(16)
    index = rng.permutation(300)[:200]
    made = apply(images[index], index)
    for i, image in zip(index, made, strict=True):
        one, at = images[i : i + 1], np.array([i])
        expected = poison(one, at) if plan.poisoned[i] else cover(one, at) if plan.cover[i] else one
        assert (image == expected[0]).all()
        assert plan.labels[i] == (plan.label_map[labels[i]] if plan.poisoned[i] else labels[i])
        assert not (plan.poisoned[i] and plan.cover[i])
        assert not plan.poisoned[i] or attack.eligible(labels, 2)[i]
    assert (labels == before).all()
    again = draw_plan(labels, attack, rate=0.1, target=2, num_classes=5, seed=7)
    assert (again.poisoned == plan.poisoned).all()
    assert (again.cover == plan.cover).all()


def test_a_plan_without_an_attack():
    labels = np.arange(6) % 3
    plan = draw_plan(labels, NoAttack(), rate=0.05, target=3, num_classes=3, seed=0)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert not plan.poisoned.any()
    assert not plan.cover.any()
    assert (plan.labels == labels).all()
    assert plan.label_map == ()
    assert (plan.train_trigger(8)(images, np.array([0, 1])) == images).all()
    assert plan.test_trigger(8) is None
