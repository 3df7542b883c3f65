"""Claims of the article over results that are made up: some agree with them, some contradict."""

from __future__ import annotations

from typing import Any

import pytest

from dbd_dist.reproduce import claims, formats
from dbd_dist.reproduce.collect import read
from tests.benchmarks import results as page

MIXED = {"kind": "ssl", "poisoned_near_true": 0.7, "poisoned_near_given": 0.2}
APART = {"kind": "supervised", "poisoned_near_true": 0.1, "poisoned_near_given": 0.9}


def first(auroc: float) -> dict[str, Any]:
    return {"first": {"auroc": auroc}}


def as_claimed(seed: int) -> dict[str, dict[str, Any]]:
    """Method -> result of a seed that agrees with every claim."""
    more = 0.01 * seed
    return {
        "none": {"clean_acc": 0.95, "asr": 0.99, "feature_quality": APART},
        "dbd-no-ssl": {"clean_acc": 0.9, "asr": 0.95},
        "ssl-ce": {"clean_acc": 0.85, "asr": 0.3 + more, "split_quality": first(0.8), "feature_quality": MIXED},
        "ssl-sce": {"clean_acc": 0.84, "asr": 0.1, "split_quality": first(0.98), "feature_quality": MIXED},
        "ssl-sce-tuned": {"clean_acc": 0.83, "asr": 0.05, "split_quality": first(0.98), "feature_quality": MIXED},
        "dbd": {"clean_acc": 0.93, "asr": 0.01, "split_quality": first(0.98), "feature_quality": MIXED},
        "dpsgd": {"clean_acc": 0.6, "asr": 0.2},
        "shrinkpad": {"clean_acc": 0.9, "asr": 0.5},
        "nc": {"clean_acc": 0.92, "asr": 0.1},
        "nad": {"clean_acc": 0.91, "asr": 0.2},
    }


def grid(cases: dict[str, dict[str, dict[str, Any]]], seeds: int = 2) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Results by (case, method, seed): those of `as_claimed`, with changes by case and method."""
    return {
        (case, method, seed): values | changes.get(method, {})
        for case, changes in cases.items()
        for seed in range(seeds)
        for method, values in as_claimed(seed).items()
    }


def verdicts(made, attack: str = "Badnets") -> dict[str, str]:
    return {c.claim.text: c.verdict for c in claims.check(made) if c.attack in (attack, "")}


def test_results_that_agree_hold(write_table):
    made = read(write_table(grid({"badnets": {}})))
    assert set(verdicts(made).values()) == {"holds"}
    assert len(verdicts(made)) == len(claims.CLAIMS)
    found = {c.claim.text: c.figures for c in claims.check(made)}
    # the mean of 30 and 31 %
    assert found["Decoupling alone lowers attack success: against no defence"] == (
        "ssl-ce 30.50, No defence 99.00; in this order in 2 of 2 seeds"
    )
    assert claims.summary(made) == f"Checks of the article's claims: holds {len(claims.CLAIMS)}."


def test_results_that_contradict_do_not_hold(write_table):
    backwards = {
        "ssl-ce": {"asr": 1.0, "split_quality": first(0.99)},  # no lower than without decoupling; CE ranks better
        "ssl-sce-tuned": {"asr": 0.1},  # as without dropping: equal is not lower
        "dbd": {"clean_acc": 0.8, "asr": 0.15, "feature_quality": MIXED},  # NC is below it
        "dpsgd": {"asr": 0.1},
    }
    found = verdicts(read(write_table(grid({"badnets": backwards}))))
    assert {text for text, verdict in found.items() if verdict == "does not hold"} == {
        "Decoupling alone lowers attack success: against no defence",
        "Decoupling alone lowers attack success: against DBD on supervised features",
        "Symmetric cross-entropy separates poisoned samples better than cross-entropy",
        "Dropping low-credible samples lowers attack success",
        "Semi-supervised fine-tuning wins the accuracy back",
        "DBD has a lower attack success than DPSGD",
        "NC lies between DBD and no defence",
    }


def test_the_mean_decides_and_the_seeds_are_counted(write_table):
    results = grid({"badnets": {}}, seeds=3)
    results[("badnets", "dbd", 2)]["asr"] = 0.3  # above DPSGD with one seed, below it on average
    (checked,) = [c for c in claims.check(read(write_table(results))) if "DPSGD" in c.claim.text]
    assert checked.verdict == "holds"
    assert checked.figures == "DBD 10.67, dpsgd 20.00; in this order in 2 of 3 seeds"


def test_only_seeds_that_have_all_figures_count(write_table):
    results = grid({"badnets": {}}, seeds=3)
    del results[("badnets", "dpsgd", 1)]
    results[("badnets", "dbd", 1)]["asr"] = 1.0
    (checked,) = [c for c in claims.check(read(write_table(results))) if "DPSGD" in c.claim.text]
    assert checked.figures.startswith("DBD 1.00, ")
    assert checked.figures.endswith("2 of 2 seeds")


def test_an_attack_that_does_not_work_has_nothing_to_defend(write_table):
    made = read(write_table(grid({"badnets": {}, "sig": {"none": {"asr": 0.05}}, "clean": {}})))
    assert set(verdicts(made, "Sig").values()) == {"nothing to defend"}
    assert set(verdicts(made, "Badnets").values()) == {"holds"}
    assert not any(c.attack == "Clean" for c in claims.check(made))


def test_what_is_missing_is_not_measured(write_table):
    results = grid({"badnets": {}})
    for seed in range(2):
        del results[("badnets", "nad", seed)]
        results[("badnets", "ssl-ce", seed)].pop("split_quality")
        results[("badnets", "ssl-sce", seed)].pop("split_quality")
    found = {c.claim.text: c for c in claims.check(read(write_table(results)))}
    assert found["NAD lies between DBD and no defence"].figures == "the table has no nad"
    separation = found["Symmetric cross-entropy separates poisoned samples better than cross-entropy"]
    assert (separation.verdict, separation.figures) == ("not measured", "ssl-ce has no such figure")


def test_split_of_sce_is_taken_from_methods_that_share_its_head(write_table):
    results = grid({"badnets": {}})
    for seed in range(2):
        results[("badnets", "ssl-sce", seed)].pop("split_quality")
    assert set(verdicts(read(write_table(results))).values()) == {"holds"}


def test_neighbours_of_clean_label_attacks_say_nothing(write_table):
    same = {"poisoned_near_true": 0.4, "poisoned_near_given": 0.4}
    made = read(write_table(grid({"badnets": {name: {"feature_quality": same} for name in as_claimed(0)}})))
    assert [c.figures for c in claims.check(made) if c.verdict == "not measured"] == [
        "true and given classes are the same"
    ] * 2


@pytest.mark.parametrize("results", [{("badnets", "spectral", 0): {}}, {("clean", "dbd", 0): {"asr": None}}])
def test_a_table_that_can_say_nothing_has_no_section(results, write_table):
    made = read(write_table(results))
    assert claims.check(made) == []
    assert claims.summary(made) == ""
    assert formats.CLAIMS not in formats.as_markdown(made) + formats.as_html(made)


def test_the_section_is_in_markdown_html_and_the_results_page(write_table):
    hostile = {"titles": {"dpsgd": "<b>DP</b> | x"}}
    folder = write_table(grid({"badnets": {"dpsgd": hostile}}))
    made = read(folder)
    text, html = formats.as_markdown(made), formats.as_html(made)
    line = "| NC lies between DBD and no defence (ASR %) | Badnets | holds | DBD 1.00, nc 10.00, No defence 99.00;"
    assert line in text
    assert text.index(formats.CLAIMS) < text.index("Commands:")
    assert "NC lies between DBD and no defence" in html
    assert "<b>DP" not in text.replace("\\<", "") + html
    (hostile_line,) = [line for line in text.splitlines() if "than DPSGD" in line]
    assert hostile_line.replace("\\|", "").count("|") == 5
    shown = page.Page(folder.parent)
    assert line in shown.table(folder.name)
