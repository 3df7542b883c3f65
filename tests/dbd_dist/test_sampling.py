"""Which sample goes where, whatever the numbers."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbd_dist import optim, seeds
from dbd_dist.data.sampling import balanced_batches, cycling_batches, epoch_batches, keep_lowest, rank_slice

settings.register_profile("samples", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("samples")

counts = st.integers(1, 300)
batches = st.integers(1, 70)
seed_numbers = st.integers(0, 2**31)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(counts, batches, seed_numbers)
def test_an_epoch_takes_samples_at_most_once(count, batch, seed):
    order = epoch_batches(count, batch, generator(seed))
    assert order.shape == (count // batch, batch)
    drawn = order.flatten().tolist()
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(range(count))
    assert torch.equal(order, epoch_batches(count, batch, generator(seed)))


def test_epochs_are_shuffled_and_leave_out_others():
    one, other = (epoch_batches(100, 30, generator(seed)) for seed in (0, 1))
    assert one.flatten().tolist() != sorted(one.flatten().tolist())
    assert set(one.flatten().tolist()) != set(other.flatten().tolist())


@given(st.sets(st.integers(0, 1000), min_size=1, max_size=50), st.integers(1, 20), batches, seed_numbers)
def test_cycling_batches_take_everything_equally_often(positions, steps, batch, seed):
    order = cycling_batches(torch.tensor(sorted(positions)), steps, batch, generator(seed))
    assert order.shape == (steps, batch)
    often = Counter(order.flatten().tolist())
    assert set(often) <= positions
    occurrences = [often[p] for p in positions]
    assert max(occurrences) - min(occurrences) <= 1
    drawn, size = order.flatten().tolist(), len(positions)
    for start in range(0, len(drawn), size):  # one whole pass after another
        part = drawn[start : start + size]
        assert len(set(part)) == len(part)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 20), batches, seed_numbers, st.data())
def test_balanced_batches_take_every_class_and_within_it_everything_equally_often(labels, steps, batch, seed, data):
    positions = sorted(data.draw(st.sets(st.integers(0, len(labels) - 1), min_size=1)))
    order = balanced_batches(torch.tensor(positions), torch.tensor(labels), steps, batch, generator(seed))
    assert order.shape == (steps, batch)
    drawn = order.flatten().tolist()
    assert set(drawn) <= set(positions)
    present = {labels[p] for p in positions}
    of_classes = [sum(labels[i] == label for i in drawn) for label in present]
    assert max(of_classes) - min(of_classes) <= 1
    for label in present:
        own = [drawn.count(p) for p in positions if labels[p] == label]
        assert max(own) - min(own) <= 1


@given(st.integers(0, 500), st.integers(1, 17))
def test_rank_slices_share_everything_in_order(count, size):
    parts = [list(range(count))[rank_slice(count, rank, size)] for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 100.0]), min_size=2, max_size=60),  # many are equal
    st.floats(0.001, 0.999),
)
def test_the_filter_keeps_the_lowest_losses(losses, fraction):
    kept = keep_lowest(torch.tensor(losses), fraction).tolist()
    wanted = min(max(round(fraction * len(losses)), 1), len(losses) - 1)
    ranked = sorted(range(len(losses)), key=lambda i: (losses[i], i))
    assert {i for i, keeps in enumerate(kept) if keeps} == set(ranked[:wanted])


@pytest.mark.parametrize(("count", "fraction", "kept"), [(240, 0.5, 120), (10, 0.001, 1), (10, 0.999, 9), (10, 0.3, 3)])
def test_number_of_kept_samples(count, fraction, kept):
    assert int(keep_lowest(torch.arange(count).float(), fraction).sum()) == kept


@given(seed_numbers, st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["simclr", "order"])), max_size=3))
def test_generators_are_functions_of_their_names(seed, names):
    def draw(*arguments) -> list[int]:
        return torch.randint(2**62, (3,), generator=seeds.generator(*arguments)).tolist()

    before = torch.random.get_rng_state()
    assert draw(seed, *names) == draw(seed, *names)
    assert draw(seed, *names) != draw(seed + 1, *names)
    assert draw(seed, *names) != draw(seed, *names, "more")
    assert draw(seed, "1") != draw(seed, 1)
    assert torch.equal(before, torch.random.get_rng_state())


@given(st.integers(0, 1000), st.integers(0, 500))
def test_cosine_warms_up_and_falls(numerator, warmup):
    progress, start = numerator / 1000, warmup / 1000
    factor = optim.cosine(progress, start)
    assert -1e-12 <= factor <= 1 + 1e-12
    if progress < start:
        assert factor == pytest.approx(float(Fraction(numerator, warmup)))
    else:
        assert optim.cosine(min(progress + 0.001, 1.0), start) <= factor + 1e-12
    assert optim.cosine(1.0, start) == pytest.approx(0.0)
    assert optim.cosine(start, start) == pytest.approx(1.0)


def test_steps_down_at_milestones():
    assert [round(optim.steps_down(epoch, (2, 4)), 6) for epoch in range(6)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    assert optim.steps_down(3, ()) == 1
