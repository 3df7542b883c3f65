"""What a sweep leaves for people: table, page, HParams, and the lines on the terminal."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tune_spaces import page, tables
from tune_spaces.metrics import Metric
from tune_spaces.show import Show


def outcome(clean: float, asr: float, **more: Any) -> dict[str, Any]:
    """What a finished trial reports."""
    metrics = {
        "clean_acc": clean,
        "asr": asr,
        "score": clean - asr,
        "kept_poisoned": 3,
        "poisoned": 24,
        "loss_gap": clean,
    }
    return {
        "status": "finished",
        "metrics": metrics,
        "spread": {},
        "seconds": 12.5,
        "waited_s": 0.0,
        "runs": [],
        "stages": {"simclr": {"seconds": 10.0, "reused": True}, "mixmatch": {"seconds": 2.0, "reused": False}},
    } | more


@pytest.fixture
def book(plan, book_of):
    """Ten trials: six finished, one stopped early, one failed, one under way, and one with a strange message."""
    book = book_of(plan)
    for number, keep in enumerate((0.2, 0.3, 0.4, 0.5, 0.6, 0.7)):
        book.begin(number, {"split.keep": keep, "warmup.sce_alpha": (0.1, 1.0)[number % 2]})
        book.end(number, **outcome(0.5 + keep / 2, abs(keep - 0.5)))
    book.begin(6, {"split.keep": 0.8, "warmup.sce_alpha": 0.1})
    book.end(6, status="stopped", epoch=5, metrics={"clean_acc": 0.2, "score": 0.1}, stages={}, waited_s=1.0, runs=[])
    book.begin(7, {"split.keep": 0.25, "warmup.sce_alpha": 1.0})
    book.end(7, status="failed", message="<script>alert(1)</script>\x1b[31m")
    book.begin(8, {"split.keep": 0.35, "warmup.sce_alpha": 1.0})
    return book


class Checker(HTMLParser):
    """Collects ids, and whatever would be loaded or run."""

    def __init__(self):
        super().__init__()
        self.ids, self.bad = [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        if tag in ("script", "link", "iframe") or any(name.startswith("on") for name in values):
            self.bad.append(tag)
        for name in ("src", "href", "xlink:href"):
            if values.get(name) and not str(values[name]).startswith(("#", "data:")):
                self.bad.append(values[name])


def test_the_page_is_whole_and_loads_nothing(plan, book):
    text = page.render(plan, book, "dbd train --config 'a b/run.json'")
    checker = Checker()
    checker.feed(text)
    assert checker.bad == []
    assert len(checker.ids) == len(set(checker.ids))
    for title in ("Sensitivity to the filtering ratio", "Parallel coordinates", "Importance", "Pareto front", "Time"):
        assert title in text
    assert "dbd train --config &#39;a b/run.json&#39;" in text
    assert "stopped early, epoch 5" in text
    assert "\x1b" not in text


def test_a_page_of_nothing(plan, book_of):
    assert "fewer than two trials have finished" in page.render(plan, book_of(plan), None)


def test_the_table_has_a_line_a_trial(plan, book):
    import pyarrow.parquet as pq

    page.write_table(book, plan.folder / "trials.parquet")
    table = pq.read_table(plan.folder / "trials.parquet").to_pylist()
    assert [row["number"] for row in table] == list(range(9))
    for row, mine in zip(table, (book.rows[i] for i in range(9))):
        assert row["status"] == mine["status"]
        assert row["config/split.keep"] == mine["values"]["split.keep"]
        assert row["metric/score"] == mine["metrics"].get("score")
    assert table[0]["reused_stages"] == ["simclr"]
    assert table[0]["seconds/mixmatch"] == 2.0


def test_values_of_several_types_become_json(plan, book_of):
    import pyarrow.parquet as pq

    book = book_of(plan)
    for number, value in enumerate((None, 4, [1, 2], "text")):
        book.begin(number, {"craft.patch_px": value})
    page.write_table(book, plan.folder / "trials.parquet")
    assert pq.read_table(plan.folder / "trials.parquet")["config/craft.patch_px"].to_pylist() == [
        "null", "4", "[1, 2]", '"text"',
    ]  # fmt: skip


def test_hparams_has_a_run_a_trial(plan, book):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    page.write_hparams(book, plan.folder / "tensorboard")
    runs = sorted(path.name for path in (plan.folder / "tensorboard").iterdir())
    assert runs == [f"trial-{number:04d}" for number in range(7)]
    events = EventAccumulator(str(plan.folder / "tensorboard" / "trial-0003"))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.Scalars("metric/score")[0].value == pytest.approx(book.rows[3]["metrics"]["score"])


def test_the_field_that_decides_is_the_most_important(plan, book):
    rows = [row for row in book.ranked() if row["status"] == "finished"]
    found = page.importance(plan, rows, [row["values"]["split.keep"] for row in rows])
    assert sum(found.values()) == pytest.approx(1)
    assert found["split.keep"] > found["warmup.sce_alpha"]
    assert page.importance(plan, rows[:3], [1.0, 2.0, 3.0]) == {}


def test_a_line_for_every_trial_names_the_best(plan, book, capsys):
    show = Show(plan, book)
    for number in (3, 6, 7):
        show.ended(book.rows[number])
    finished, stopped, failed = capsys.readouterr().out.splitlines()
    assert finished.startswith(
        "trial 3 (8 of 10): split.keep 0.5, warmup.sce_alpha 1 -> score 0.75, clean_acc 0.75, asr 0"
    )
    assert finished.endswith("(12 s; reused simclr) | best: trial 3, score 0.75")
    assert "[stopped early, epoch 5]" in stopped
    assert "failed: <script>" in failed
    assert "\x1b" not in failed


def test_the_time_table_counts_reuse(book):
    _, lines = tables.stages(book.ranked())
    assert lines[0] == ["simclr", "0", "6", "0.0 s", "1 min"]
    assert lines[1] == ["mixmatch", "6", "0", "12 s", "0.0 s"]
    assert lines[2][3] == "1.0 s"


def test_columns_of_text():
    text = tables.as_text(["trial", "score"], [["0", "0.75"], ["11", "-1"]])
    assert text.splitlines() == ["trial  score", "0       0.75", "11        -1"]


def test_what_all_points_of_a_grid_share(plan):
    """Two weights of the loss, five fractions, counted by hand."""
    assert tables.shared(plan) == {"simclr": 1, "warmup": 2, "mixmatch": 10}
    assert tables.shared(dataclasses.replace(plan, search="tpe")) == {}


def test_without_the_truth_the_summary_says_so(plan, book):
    blind = dataclasses.replace(plan, truth=False, metrics=(Metric("loss_gap", True),))
    text = tables.summary(blind, book)
    assert "chosen without the truth" in text
    assert re.search(r"loss_gap: rank correlation with the score [+-]\d\.\d\d over 6 trials", text)
    assert "chosen without the truth" not in tables.summary(plan, book)


def test_templates_are_in_the_package():
    assert (Path(page.environment.__code__.co_filename).parent / "templates" / "sweep.html").is_file()
