"""What stands between Tune and the book, without Ray: who is next, how trials end, what is told to stop."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from tune_spaces.plan import Asha
from tune_spaces.space import choice, grid, uniform
from tune_spaces.sweep import Keeper, job_of, size_of

FOUR = {"split.keep": choice(0.3, 0.4, 0.5, 0.6)}


class Silent:
    """Prints nothing; remembers what ended."""

    def __init__(self):
        self.rows = []

    def ended(self, row):
        self.rows.append(row)


@pytest.fixture
def four(plan):
    return dataclasses.replace(plan, vary=FOUR, trials=4)


def outcome(score: float) -> dict:
    return {"outcome": json.dumps({"status": "finished", "metrics": {"score": score}, "runs": []})}


def leave_rows(plan, number: int, *values: float, epochs: int = 20) -> None:
    """Metrics of a run that was measured every fifth epoch."""
    folder = plan.folder / f"trial-{number:04d}"
    folder.mkdir(parents=True)
    rows = [
        {"stage": "mixmatch", "epoch": 5 * (i + 1), "epochs": epochs, "time_s": 1.0, "clean_acc": value, "asr": 0.0}
        for i, value in enumerate(values)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_point_is_proposed_once_and_written_down(four, book_of):
    book = book_of(four)
    keeper = Keeper(four, book, Silent())
    proposed = [keeper.propose(f"t{i}") for i in range(5)]
    assert [p and p["number"] for p in proposed] == [0, 1, 2, 3, None]
    assert [json.loads(p["values"]) for p in proposed if p] == grid(FOUR)
    assert [row["status"] for row in book.rows.values()] == ["running"] * 4


def test_a_sweep_that_was_cut_off_repeats_what_is_not_over(four, book_of):
    book = book_of(four)
    keeper = Keeper(four, book, Silent())
    for i in range(3):
        keeper.propose(f"t{i}")
    keeper.completed("t0", outcome(0.5))
    keeper.errored("t2", "killed")
    again = Keeper(four, book_of(four), Silent())
    assert [again.propose(f"u{i}")["number"] for i in range(3)] == [1, 2, 3]
    assert again.propose("u3") is None


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_cut_off_anywhere_the_proposals_are_the_same(plan, book_of, search):
    plan = dataclasses.replace(plan, vary={"split.keep": uniform(0.2, 0.8)}, search=search, trials=12)

    def values_of(cuts: tuple[int, ...], name: str) -> list[dict]:
        mine = dataclasses.replace(plan, name=name)
        number = 0
        for cut in (*cuts, 12):
            keeper = Keeper(mine, book_of(mine), Silent())
            while number < cut:
                proposed = keeper.propose(f"t{number}")
                assert proposed["number"] == number
                keeper.completed(f"t{number}", outcome(-abs(json.loads(proposed["values"])["split.keep"] - 0.4)))
                number += 1
            keeper.propose("under way")  # and killed
        return [row["values"] for _, row in sorted(book_of(mine).rows.items())]

    assert values_of((), "whole") == values_of((2, 5, 9), "cut")


def test_how_trials_end(four, book_of):
    show, book = Silent(), book_of(four)
    keeper = Keeper(four, book, show)
    for i in range(4):
        keeper.propose(f"t{i}")
    leave_rows(four, 1, 0.25, 0.5)
    keeper.completed("t0", outcome(0.5))
    keeper.completed("t1", {"epoch": 10, "value": 0.5})  # by the scheduler
    keeper.completed("t2", {"outcome": json.dumps({"status": "failed", "message": "the loss is not finite"})})
    keeper.errored("t3", "its process has ended")
    assert [book.rows[i]["status"] for i in range(4)] == ["finished", "stopped", "failed", "failed"]
    assert (book.rows[1]["epoch"], book.rows[1]["metrics"]["clean_acc"]) == (10, 0.5)
    assert book.rows[1]["stages"] == {"mixmatch": {"seconds": 2.0, "reused": False}}
    assert [row["number"] for row in show.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize("why", ["SIGINT", "SIGTERM", "budget"])
def test_a_request_to_stop_reaches_the_runs_and_leaves_their_trials_to_be_resumed(four, book_of, why):
    book = book_of(four)
    keeper = Keeper(four, book, Silent())
    for i in range(2):
        keeper.propose(f"t{i}")
    run = four.folder / "trial-0001" / "dbd"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert not keeper.wants_stop()
    with keeper.stopping():
        keeper.request(why)
        assert keeper.wants_stop()
        assert (run / "stop").read_text() == ("SIGTERM" if why == "budget" else why)
        assert (four.folder / "stop").exists()
        assert keeper.propose("t2") is None
        keeper.completed("t0", {"outcome": json.dumps({"status": "interrupted"})})
        keeper.errored("t1", "ended with Ray")
    assert not (four.folder / "stop").exists()
    assert [row["status"] for row in book.rows.values()] == ["running", "running"]
    assert [book.ended(i) for i in range(2)] == [False, False]


def test_a_budget_of_time_ends_it(four, book_of):
    keeper = Keeper(dataclasses.replace(four, time_budget_s=1e-9), book_of(four), Silent())
    assert keeper.wants_stop()
    assert keeper.why == "budget"


def test_early_stopping_remembers_what_earlier_commands_saw(four, book_of):
    """Three good trials of an earlier command: of this one, a bad trial is stopped at once, a good one not."""
    plan = dataclasses.replace(four, asha=Asha(grace=5, reduction=2))
    book = book_of(plan)
    for number, value in enumerate((0.8, 0.9, 0.85)):
        book.begin(number, {"split.keep": 0.3})
        leave_rows(plan, number, value, value)
        book.end(number, status="finished", metrics={"score": value}, runs=[str(plan.folder / f"trial-{number:04d}")])
    scheduler = Keeper(plan, book, Silent())._scheduler
    actions = {}
    for name, value in (("bad", 0.1), ("good", 0.95)):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        actions[name] = scheduler.on_trial_result(None, trial, {"epoch": 5, "value": value})
    assert actions == {"bad": "STOP", "good": "CONTINUE"}


def test_what_a_trial_is_told_is_plain(plan):
    from cluster import topology

    size = size_of(plan, topology.Topology((topology.Node(host="h", address="a", cpus=2, gpus=0),)))
    job = job_of(plan, size)
    assert json.loads(json.dumps(job)) == job
    assert job["base"]["compute"]["threads"] == 1
    assert job["base"]["compute"]["workers"] == 1
