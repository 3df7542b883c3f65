"""sweep.json: after every trial, ranked, and only for the sweep that wrote it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from data_prep.errors import UserError
from tune_spaces.book import Book
from tune_spaces.metrics import Metric


def outcome(clean: float, asr: float, **more):
    return {"status": "finished", "metrics": {"clean_acc": clean, "asr": asr, "score": clean - asr}, **more}


def test_the_file_follows_every_trial(plan, book_of):
    book = book_of(plan)
    stored = lambda: json.loads((plan.folder / "sweep.json").read_text())["trials"]  # noqa: E731
    book.begin(0, {"split.keep": 0.2})
    assert [(row["number"], row["status"]) for row in stored()] == [(0, "running")]
    book.begin(1, {"split.keep": 0.4})
    book.end(0, **outcome(0.5, 0.1))
    assert [(row["number"], row["status"]) for row in stored()] == [(0, "finished"), (1, "running")]
    book.end(1, **outcome(0.9, 0.1))
    assert [row["number"] for row in stored()] == [1, 0]
    again = book_of(plan)
    assert again.rows == book.rows
    assert again.best() == book.rows[1]
    assert [again.ended(i) for i in range(3)] == [True, True, False]


def test_failed_and_cut_off_trials_are_not_over_and_not_ranked(plan, book_of):
    book = book_of(plan)
    for number, fields in enumerate(
        [
            outcome(0.5, 0.0),
            {"status": "failed", "message": "x"},
            {"status": "stopped", "epoch": 5, "metrics": {"score": 0.9}},
        ]
    ):
        book.begin(number, {})
        book.end(number, **fields)
    assert [row["number"] for row in book.ranked()] == [0, 1, 2]
    assert [book.ended(i) for i in range(3)] == [True, False, True]


def test_the_front_comes_first_with_several_metrics(plan, book_of):
    plan = dataclasses.replace(plan, metrics=(Metric("clean_acc", True), Metric("asr", False)))
    book = book_of(plan)
    for number, (clean, asr) in enumerate([(0.9, 0.9), (0.5, 0.0), (0.8, 0.95), (0.7, 0.1)]):
        book.begin(number, {})
        book.end(number, **outcome(clean, asr))
    assert sorted(row["number"] for row in book.front()) == [0, 1, 3]
    assert [row["number"] for row in book.ranked()] == [0, 3, 1, 2]


def test_attacks_that_are_too_visible_are_below_all_others(plan, book_of):
    plan = dataclasses.replace(plan, metrics=(Metric("asr", True),), attacks=True)
    book = book_of(plan)
    for number, metrics in enumerate([{"too_visible_by": 0.5}, {"asr": 0.0}, {"too_visible_by": 0.1}, {"asr": 0.3}]):
        book.begin(number, {})
        book.end(number, status="finished", metrics=metrics)
    assert [row["number"] for row in book.ranked()] == [3, 1, 2, 0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"space": "other"}, "another space"),
        ({"search": "tpe"}, "another search"),
        ({"metrics": (Metric("asr", False),)}, "another metric"),
        ({"truth": False}, "another truth"),
        ({"fixed": {"warmup.epochs": 3}}, "another fix"),
    ],
)
def test_another_sweep_in_the_same_folder(plan, book_of, change, named):
    book_of(plan).begin(0, {})
    other = dataclasses.replace(plan, **change)
    with pytest.raises(UserError, match=named) as caught:
        book_of(other)
    assert caught.value.where == plan.folder


def test_more_trials_of_the_same_sweep(plan, book_of):
    book_of(plan).begin(0, {})
    assert list(book_of(dataclasses.replace(plan, trials=40, parallel=1)).rows) == [0]


@pytest.mark.parametrize("text", ["{", "[]", '{"sweep": {}}', '{"sweep": {}, "trials": [{"number": "0"}]}', "\xff"])
def test_a_damaged_file(plan, text):
    plan.folder.mkdir(parents=True)
    (plan.folder / "sweep.json").write_text(text)
    with pytest.raises(UserError, match="not the trials of a sweep"):
        Book(plan.folder, plan.identity("data"), plan.metrics)


def test_a_sweep_of_an_earlier_version(plan):
    plan.folder.mkdir(parents=True)
    (plan.folder / "grid.json").write_text("{}")
    with pytest.raises(UserError, match="earlier version"):
        Book(plan.folder, plan.identity("data"), plan.metrics)
