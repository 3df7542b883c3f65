"""Rows over seeds against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from dbd_dist.reporting import page, tables


def result(**values):
    return {
        "method": "dbd", "preset": "p", "dataset": "digits-badnets-r0.05-t3-s0", "attack": "badnets", "seed": 0,
        "clean_acc": 0.9, "asr": 0.0, "robust_acc": 0.8, "kept_poisoned": 1, "poisoned": 72, "train_size": 1438,
        "seconds": {"simclr": 60.0, "warmup": 5.0}, "world_size": 1, "device": "a CPU",
    } | values  # fmt: skip


def over_seeds(values, **more):
    return [
        result(seed=seed, dataset=f"digits-badnets-r0.05-t3-s{seed}", clean_acc=value, **more)
        for seed, value in enumerate(values)
    ]


def test_mean_and_sample_standard_deviation():
    (row,) = tables.aggregate(over_seeds([0.90, 0.92, 0.97]))
    accuracy = row.stat("clean_acc")
    assert accuracy is not None
    assert accuracy.n == 3
    assert accuracy.mean == pytest.approx(0.93)
    # deviations -3, -1, 4 points: squares 9 + 1 + 16 = 26, over 2
    assert accuracy.std == pytest.approx(math.sqrt(13) / 100)
    assert "93.00 ± 3.61" in tables.as_text([row])
    assert "seeds 0–2" in tables.as_text([row])


def test_one_run_has_no_spread():
    (row,) = tables.aggregate([result()])
    assert row.stat("clean_acc") == tables.Stat(0.9, None, 1)
    assert "±" not in tables.as_text([row])
    assert "1 min 5 s" in tables.as_text([row])


def test_plain_comes_first_and_rows_are_not_mixed():
    rows = tables.aggregate([result(), result(method="none", asr=0.99), result(preset="other")])
    found = [(row.preset, row.method, len(row.results)) for row in rows]
    assert found == [
        ("p", "none", 1),
        ("p", "dbd", 1),
        ("other", "dbd", 1),
    ]


def test_settings_that_differ_make_rows():
    rows = tables.aggregate([result(), result()], ["split.keep=0.4", "split.keep=0.5"])
    assert [len(row.results) for row in rows] == [1, 1]


def test_a_run_counted_twice_is_noted():
    (row,) = tables.aggregate([result(), result()])
    assert any("seed 0 counted more than once" in note for note in row.remarks)
    (row,) = tables.aggregate([result(seed=None), result(seed=None)])
    assert row.remarks == []


def test_measures_that_do_not_exist_are_dashes():
    (row,) = tables.aggregate([result(asr=None, robust_acc=None, kept_poisoned=None, poisoned=None)])
    cells = [cell(row) for cell in tables.COLUMNS.values()]
    assert cells[3:6] == ["–", "–", "–"]


def test_hostile_names_in_tables():
    bad = result(method="<script>x</script>", device="<img src=x>", dataset="a|b\u202e", preset="`p`")
    rows = tables.aggregate([bad, result(preset="<b>")])
    html = (
        page.environment()
        .from_string('{% import "macros.html" as page with context %}{{ page.results(groups) }}')
        .render(groups=tables.grouped(rows))
    )
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html + tables.as_text(rows) + tables.as_markdown(rows)
    assert "a\\|b" in tables.as_markdown(rows)


def test_methods_come_in_order():
    """The baseline first, whatever it is called, then defences by name."""
    results = [result(method=name) for name in ("abl", "dbd", "none")] + [result(method="plain", defends=False)]
    assert [row.method for row in tables.aggregate(results)] == ["none", "plain", "abl", "dbd"]


def test_methods_with_clean_images_are_marked():
    rows = tables.aggregate([result(method="dbd"), result(method="nad", needs_clean=True)])
    assert [tables.COLUMNS["method"](row) for row in rows] == ["DBD", "nad †"]
    assert any(note.startswith("† needs clean images") for note in tables.notes(rows))
    assert not any("†" in note for note in tables.notes(rows[:1]))
