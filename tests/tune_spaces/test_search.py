"""Searches: what they propose is a function of seed, number and what has ended."""

from __future__ import annotations

import pytest

from tune_spaces.search import AtRandom, Grid, Tpe
from tune_spaces.space import choice, grid, integer, loguniform, uniform

VARY = {"x": uniform(0.0, 1.0), "y": loguniform(1e-3, 1.0), "n": integer(1, 9), "c": choice(None, "a", [1, 2])}


def score(values: dict) -> list[float]:
    return [-((values["x"] - 0.3) ** 2) - (0.5 if values["c"] == "a" else 0.0)]


def run(search: Tpe, numbers: range) -> list[dict]:
    found = []
    for number in numbers:
        values = search.propose(number)
        assert values is not None
        found.append(values)
        search.ended(number, values, score(values), early=None)
    return found


def test_a_grid_ends():
    search = Grid(grid({"a": choice(1, 2)}))
    assert [search.propose(i) for i in range(3)] == [{"a": 1}, {"a": 2}, None]


def test_random_draws_do_not_depend_on_their_order():
    search, again = AtRandom(VARY, 3), AtRandom(VARY, 3)
    forward = [search.propose(i) for i in range(20)]
    assert [again.propose(i) for i in reversed(range(20))] == forward[::-1]
    assert [AtRandom(VARY, 4).propose(i) for i in range(20)] != forward
    for values in forward:
        assert values is not None
        assert all(given.holds(values[field]) for field, given in VARY.items())


def test_random_draws_from_listed_values_repeat_none():
    vary = {"a": choice(1, 2, 3), "b": choice("x", None)}
    found = [AtRandom(vary, 3).propose(i) for i in range(7)]
    assert sorted(map(str, found[:6])) == sorted(map(str, grid(vary)))
    assert found[6] is None
    assert found[:6] != grid(vary)
    assert [AtRandom(vary, 4).propose(i) for i in range(6)] != found[:6]


def test_tpe_that_was_cut_off_proposes_as_if_it_had_not_been():
    whole = run(Tpe(VARY, 5, objectives=1), range(16))
    for cut in (3, 12):
        search = Tpe(VARY, 5, objectives=1)
        for number, values in enumerate(whole[:cut]):
            search.ended(number, values, score(values), early=None)
        search.begun(cut, whole[cut])  # it was under way
        search.ended(cut, whole[cut], score(whole[cut]), early=None)
        assert run(search, range(cut + 1, 16)) == whole[cut + 1 :]


def test_tpe_learns():
    found = run(Tpe(VARY, 0, objectives=1), range(40))
    late, early = found[-10:], found[:8]
    assert all(given.holds(values[field]) for values in found for field, given in VARY.items())
    assert sum(score(v)[0] for v in late) / 10 > sum(score(v)[0] for v in early) / 8


def test_tpe_takes_failures_early_stops_and_several_objectives():
    search = Tpe(VARY, 0, objectives=1)
    for number, (signed, early) in enumerate([(None, None), ([0.5], 5), ([0.7], None)]):
        values = search.propose(number)
        assert values is not None
        search.ended(number, values, signed, early=early)
    assert search.propose(3) is not None

    search = Tpe(VARY, 0, objectives=2)
    for number in range(12):
        values = search.propose(number)
        assert values is not None
        search.ended(number, values, [values["x"], -values["y"]], early=None)
    assert len(search._study.best_trials) >= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds_differ(seed):
    assert Tpe(VARY, seed, objectives=1).propose(0) != Tpe(VARY, seed + 1, objectives=1).propose(0)
