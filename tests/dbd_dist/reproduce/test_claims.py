"""Claims of the article over results that are made up: some agree with them, some contradict."""

from __future__ import annotations

from typing import Any

import pytest

from dbd_dist.reproduce import claims, formats
from dbd_dist.reproduce.collect import read, target_of
from tests.benchmarks import results as page

MIXED = {"kind": "ssl", "poisoned_near_true": 0.7, "poisoned_near_given": 0.2}
APART = {"kind": "supervised", "poisoned_near_true": 0.1, "poisoned_near_given": 0.9}


def first(auroc: float) -> dict[str, Any]:
    return {"first": {"auroc": auroc}}


def as_claimed(seed: int) -> dict[str, dict[str, Any]]:
    """Method -> result of a seed that agrees with every claim."""
    more = 0.01 * seed
    return {
        "none": {"clean_acc": 0.94, "asr": 0.99, "feature_quality": APART},
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
        "DBD has an attack success below 2 %",
        "DBD has an accuracy within 2 points of no defence",
        "DBD has a lower attack success than DPSGD",
        "... by more than 5 points",
        "NC lies between DBD and no defence",
    }


def of(made, text: str, attack: str = "Badnets") -> claims.Checked:
    (checked,) = [c for c in claims.check(made) if c.claim.text == text and c.attack == attack]
    return checked


DPSGD = "DBD has a lower attack success than DPSGD"


def test_means_and_most_seeds_decide(write_table):
    results = grid({"badnets": {}}, seeds=3)
    results[("badnets", "dbd", 2)]["asr"] = 0.3  # above DPSGD with one seed, below it on average
    checked = of(read(write_table(results)), DPSGD)
    assert checked.verdict == "holds"
    assert checked.figures == "DBD 10.67, dpsgd 20.00; in this order in 2 of 3 seeds"


@pytest.mark.parametrize(
    ("asr", "figures"),
    [
        ((0.0, 0.21, 0.21), "DBD 14.00, dpsgd 20.00; in this order in 1 of 3 seeds"),  # the mean is one seed's
        ((0.01, 0.01, 0.9), "DBD 30.67, dpsgd 20.00; in this order in 2 of 3 seeds"),
    ],
)
def test_means_and_most_seeds_that_differ_are_said(asr, figures, write_table):
    results = grid({"badnets": {}}, seeds=3)
    for seed, share in enumerate(asr):
        results[("badnets", "dbd", seed)]["asr"] = share
    checked = of(read(write_table(results)), DPSGD)
    assert (checked.verdict, checked.figures) == ("seeds disagree", figures)


@pytest.mark.parametrize(
    ("dbd", "dpsgd", "untriggered", "verdict"),
    [
        (0.01, 0.2, 0.1, "holds"),
        (0.01, 0.2, 0.19, "nothing to lower"),  # 20 % are called the target with and 19 % without the trigger
        (0.2, 0.2, 0.19, "nothing to lower"),
        (0.5, 0.2, 0.19, "does not hold"),  # DBD's own trigger works
    ],
)
def test_attack_success_that_is_not_the_triggers_is_nothing_to_lower(dbd, dpsgd, untriggered, verdict, write_table):
    changes = {"dbd": {"asr": dbd}, "dpsgd": {"asr": dpsgd, "asr_untriggered": untriggered}}
    results = grid({"badnets": changes}, seeds=3)
    del results[("badnets", "dpsgd", 0)]["asr_untriggered"]  # of a version that had no such field
    checked = of(read(write_table(results)), DPSGD)
    assert checked.verdict == verdict
    said = "; dpsgd has 20.00 with and 19.00 without the trigger (n = 2)"
    assert checked.figures.endswith(said) == (verdict == "nothing to lower")


@pytest.mark.parametrize(
    ("recognised", "verdict", "said"),
    [
        (0.9, "holds", ""),
        (0.3, "holds", "; of the target class DBD recognises 30.00"),
        (0.05, "target lost", "; of the target class DBD recognises 5.00"),
    ],
)
def test_a_network_without_the_target_class_shows_nothing(recognised, verdict, said, write_table):
    by_class = [1.0] * 10
    by_class[4] = recognised
    commands = ["dbd prepare digits badnets --target 4 --seed 0", "dbd train smoke --method dbd"]
    results = grid({"badnets": {"dbd": {"per_class_acc": by_class, "commands": commands}}})
    checked = of(read(write_table(results)), DPSGD)
    assert (checked.verdict, checked.figures) == (
        verdict,
        "DBD 1.00, dpsgd 20.00; in this order in 2 of 2 seeds" + said,
    )


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("dbd prepare digits badnets --seed 0", 3),
        ("dbd prepare digits badnets --protocol ten-percent", 0),
        ("dbd prepare digits badnets --protocol=ten-percent --target=7", 7),
        ("dbd prepare digits badnets --mapping all-to-all", None),
        ("dbd prepare parquet badnets --target cat", None),
        ("dbd prepare digits badnets --protocol of-the-future", None),
    ],
)
def test_the_target_is_that_of_the_command(command, target):
    commands = ["dbd prepare digits clean --target 9", command, "dbd train smoke --method dbd --data x"]
    assert target_of({"asr": 0.5, "commands": commands}) == target
    assert target_of({"asr": None, "commands": commands}) is None
    assert target_of({"asr": 0.5}) is None
    assert target_of({"asr": 0.5, "commands": ["dbd prepare digits badnets --target '3"]}) is None


@pytest.mark.parametrize(
    ("text", "change", "figures"),
    [
        ("DBD has an attack success below 2 %", {"asr": 0.02}, "DBD 2.00, the article 2.00"),
        (
            "DBD has an accuracy within 2 points of no defence",
            {"clean_acc": 0.91},
            "No defence less 2 points 92.00, DBD 91.00",
        ),
        ("... by more than 5 points", {"asr": 0.16}, "DBD 16.00, dpsgd less 5 points 15.00"),
        (
            "... and an accuracy more than 20 points higher",
            {"clean_acc": 0.79},
            "dpsgd 60.00, DBD less 20 points 59.00",
        ),
    ],
)
def test_margins_of_the_article(text, change, figures, write_table):
    checked = of(read(write_table(grid({"badnets": {"dbd": change}}))), text)
    assert (checked.verdict, checked.figures) == ("does not hold", f"{figures}; in this order in 0 of 2 seeds")


@pytest.mark.parametrize("attack", ["sig", "label-consistent"])
def test_accuracy_near_that_of_no_defence_is_stated_of_attacks_that_change_labels(attack, write_table):
    changes = {name: {"attack": attack} for name in as_claimed(0)}
    found = claims.check(read(write_table(grid({"badnets": {}, "mine": changes}))))
    near = [c.attack for c in found if c.claim.text == "DBD has an accuracy within 2 points of no defence"]
    assert near == ["Badnets"]


def test_only_seeds_that_have_all_figures_count(write_table):
    results = grid({"badnets": {}}, seeds=3)
    del results[("badnets", "dpsgd", 1)]
    results[("badnets", "dbd", 1)]["asr"] = 1.0
    checked = of(read(write_table(results)), DPSGD)
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
