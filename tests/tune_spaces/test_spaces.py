"""Spaces: distributions, the named ones, files, and what the command line changes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from data_prep.errors import UserError
from dbd_dist.config import override
from dbd_dist.presets import preset
from tune_spaces import spaces
from tune_spaces.attack_settings import check_attack, of_training
from tune_spaces.space import Choice, Range, Space, choice, grid, integer, logint, loguniform, uniform
from tune_spaces.spaces import SPACES, assignments, distribution, literal, space, varied


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("smoke", [False, True])
def test_every_bound_of_a_named_space_is_allowed(name, smoke):
    vary, _ = varied(space(name), smoke=smoke, vary={}, fix={})
    base = preset("demo").config()
    if SPACES[name].attacks:
        check_attack(vary, {})
    for field, given in vary.items():
        for value in (*given.bounds(), *given.points()):
            override(base, of_training({field: value}))
            assert given.holds(value)


@pytest.mark.parametrize("name", SPACES)
def test_a_smoke_run_has_few_trials_and_every_space_says_why(name):
    assert 2 <= len(grid(varied(space(name), smoke=True, vary={}, fix={})[0])) <= 8
    assert len(space(name).why) > 40


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform(0.2, 0.8)", uniform(0.2, 0.8)),
        ("uniform(0.2,0.8)", uniform(0.2, 0.8)),
        (" loguniform(1e-3, 1)", loguniform(1e-3, 1)),
        ("int(5, 20)", integer(5, 20)),
        ("logint(1, 64)", logint(1, 64)),
        ("choice('global', 'balanced')", choice("global", "balanced")),
        ("choice(None, 4, [1, 2])", choice(None, 4, [1, 2])),
        ("uniform(-1, 1)", uniform(-1, 1)),
    ],
)
def test_distributions_from_the_command_line(text, expected):
    found = distribution(text, "--vary x")
    assert found == expected
    assert distribution(str(found), "again") == found


@pytest.mark.parametrize(
    "text",
    [
        "uniform", "uniform(1)", "uniform(0.2, 0.8", "uniform(0.8, 0.2)", "uniform(1, 1)", "choice()",
        "uniform('a', 'b')",
        "normal(0, 1)", "loguniform(0, 1)", "int(0.5, 2)", "uniform(True, 2)", "uniform(low=1, high=2)",
        "__import__('os').system('true')", "choice(open('x'))", "uniform(0, 1e999)", "0.5", "(" * 500,
    ],
)  # fmt: skip
def test_what_is_no_distribution_says_what_is(text):
    with pytest.raises(UserError) as caught:
        distribution(text, "--vary split.keep")
    assert caught.value.where == "--vary split.keep"
    assert caught.value.expected


def test_draws_lie_within_their_range_and_follow_it():
    shares = [i / 1000 for i in range(1000)]
    assert [choice("a", "b").at(s) for s in (0.0, 0.49, 0.5, 0.999)] == ["a", "a", "b", "b"]
    values = [loguniform(0.01, 1.0).at(s) for s in shares]
    assert sum(v < 0.1 for v in values) == pytest.approx(500, abs=2)
    assert min(values) == pytest.approx(0.01)
    assert {integer(1, 3).at(s) for s in shares} == {1, 2, 3}
    assert uniform(2.0, 4.0).at(0.25) == 2.5


def test_a_grid_takes_the_listed_points_or_even_steps():
    assert uniform(0.1, 0.9).points() == (0.1, 0.3, 0.5, 0.7, 0.9)
    assert uniform(0.1, 0.9, grid=(0.2, 0.4)).points() == (0.2, 0.4)
    assert integer(1, 3).points() == (1, 2, 3)
    assert loguniform(0.01, 100).points() == pytest.approx((0.01, 0.1, 1, 10, 100))
    points = grid({"a": choice(1, 2), "b": choice("x", "y", "z")})
    assert points == [{"a": a, "b": b} for a in (1, 2) for b in ("x", "y", "z")]


def test_the_command_line_varies_and_fixes():
    chosen = Space(vary={"split.keep": uniform(0.1, 0.9), "warmup.lr": choice(0.1, 0.2)}, why="")
    vary, fixed = varied(chosen, smoke=False, vary={"warmup.epochs": "int(1, 4)"}, fix={"warmup.lr": "0.1"})
    assert vary == {"split.keep": uniform(0.1, 0.9), "warmup.epochs": integer(1, 4)}
    assert fixed == {"warmup.lr": 0.1}
    with pytest.raises(UserError, match="varied and fixed"):
        varied(chosen, smoke=False, vary={"split.keep": "uniform(0.1, 0.2)"}, fix={"split.keep": "0.1"})
    with pytest.raises(UserError, match="every field of the space is fixed"):
        varied(chosen, smoke=False, vary={}, fix={"split.keep": "0.1", "warmup.lr": "0.1"})
    assert [literal(t) for t in ("1", "0.5", "True", "None", "[1, 2]", "cosine")] == [
        1,
        0.5,
        True,
        None,
        [1, 2],
        "cosine",
    ]


@pytest.mark.parametrize("text", ["split.keep", "=1", "split.keep=", "split.keep= "])
def test_assignments_need_both_sides(text):
    with pytest.raises(UserError, match="FIELD=VALUE"):
        assignments([text], "--fix")


def test_a_field_may_be_written_like_a_flag_but_not_twice():
    assert assignments(["warmup.sce-alpha=1"], "--fix") == {"warmup.sce_alpha": "1"}
    with pytest.raises(UserError, match="twice"):
        assignments(["a=1", "a=2"], "--fix")


def test_spaces_together():
    both = space("sce+filter")
    assert set(both.vary) == set(SPACES["sce"].vary) | set(SPACES["filter"].vary)
    assert both.search == "grid"
    assert space("filter+simclr").search == "tpe"


def test_unknown_space_names_those_there_are():
    with pytest.raises(UserError, match=r"'everything'.*sce, filter"):
        space("everything")


# -- spaces in files


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return f"file:{path}"


def test_a_space_in_a_file(tmp_path):
    found = space(
        write(
            tmp_path / "mine.py",
            "from tune_spaces.space import Space, uniform\n"
            "MINE = Space(vary={'split.keep': uniform(0.4, 0.6)}, why='the middle')\n",
        )
    )
    assert found.vary == {"split.keep": uniform(0.4, 0.6)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nothing_of_that_name", r"line 1, ModuleNotFoundError"),
        ("x = 1\ny = (", r"line 2, SyntaxError"),
        ("x = 1\n\nraise ValueError('of my own')", r"line 3, ValueError: of my own"),
        ("x = 1", "defines 0 spaces"),
        (
            "from tune_spaces.space import Space\nA = Space(vary={}, why='')\nB = Space(vary={}, why='')",
            "defines 2 spaces",
        ),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_file_that_is_no_space(tmp_path, text, expected):
    with pytest.raises(UserError, match=expected) as caught:
        space(write(tmp_path / "mine.py", text))
    assert str(tmp_path / "mine.py") in str(caught.value.where)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        space(f"file:{tmp_path / 'mine.py'}")


def test_a_space_of_other_things_than_distributions():
    broken = Space(vary={"split.keep": (0.1, 0.2)}, why="")  # type: ignore[dict-item]
    with pytest.raises(UserError, match="not a distribution"):
        varied(broken, smoke=False, vary={}, fix={})


def test_every_form_has_a_name():
    assert set(spaces.FORMS) == {"choice", "uniform", "loguniform", "int", "logint"}
    assert math.isclose(Range(low=1, high=3).at(0.5), 2)
    assert Choice((1,)).at(0.99) == 1
