"""The sentence at the top: right for every case, and no success where there is none."""

from __future__ import annotations

import pytest

from dbd_dist.reporting.conclusions import verdicts
from dbd_dist.reporting.tables import aggregate


def result(method, clean_acc, asr=None, seed=0, **more):
    return {
        "method": method, "preset": "demo", "dataset": f"digits-badnets-r0.05-t3-s{seed}", "attack": "badnets",
        "seed": seed, "clean_acc": clean_acc, "asr": asr, "poisoned": 72, "train_size": 1438,
    } | more  # fmt: skip


def said(*results, variants=None):
    return verdicts(aggregate(results, variants), results)


def test_success():
    assert said(result("none", 0.983, 0.994), result("dbd", 0.972, 0.0)) == [
        "Trained plainly, the network obeys the trigger on 99.4 % of triggered images; DBD brings that to 0.0 % for "
        "1.1 points of clean accuracy (97.2 % remain)."
    ]


@pytest.mark.parametrize(
    ("clean_acc", "words"),
    [
        (0.983, "brings that to 1.0 % at the same clean accuracy (98.3 %)."),
        (0.990, "brings that to 1.0 %, and clean accuracy rises by 0.7 points, to 99.0 %."),
        (0.365, "brings that to 1.0 %, but clean accuracy falls by 61.8 points, to 36.5 %."),
    ],
)
def test_price(clean_acc, words):
    (text,) = said(result("none", 0.983, 0.994), result("dbd", clean_acc, 0.01))
    assert words in text


@pytest.mark.parametrize(
    ("plain", "defended", "words"),
    [
        (0.99, 0.06, "lowers that to 6.0 %: the backdoor is weaker, not gone."),
        (0.99, 0.60, "it still does so on 60.0 %: the defence did not hold."),
        (0.31, 0.51, "it even does so on 51.0 %: the defence did not hold."),
        (0.05, 0.02, "The attack hardly works here"),
        (0.05, 0.90, "so DBD made it worse."),
    ],
)
def test_no_success_is_claimed(plain, defended, words):
    (text,) = said(result("none", 0.98, plain), result("dbd", 0.97, defended))
    assert words in text
    assert "brings" not in text


def test_seeds_give_the_range():
    (text,) = said(
        *(result("none", 0.98, asr, seed) for seed, asr in enumerate((0.98, 1.0))),
        *(result("dbd", 0.97, asr, seed) for seed, asr in enumerate((0.0, 0.01))),
    )
    assert "99.0 % (98.0 % to 100.0 % over seeds 0, 1)" in text
    assert "DBD brings that to 0.5 % (0.0 % to 1.0 % over seeds 0, 1) for 1.0 points" in text


def test_seeds_that_agree_give_no_range():
    (text,) = said(*(result(m, 0.97, asr, seed) for m, asr in (("none", 1.0), ("dbd", 0.0)) for seed in (0, 1)))
    assert "DBD brings that to 0.0 % (seeds 0, 1) at the same clean accuracy" in text


def test_one_bad_seed_is_named():
    plain = [result("none", 0.98, 0.99, seed) for seed in range(20)]
    good = [result("dbd", 0.97, 0.0, seed) for seed in range(19)]
    (text,) = said(*plain, *good, result("dbd", 0.97, 0.8, 19))
    assert "4.0 % on average, but not in every run: at worst it is 80.0 %" in text


def test_single_runs():
    (text,) = said(result("none", 0.98, 0.99))
    assert "obeys the trigger on 99.0 % of triggered images and is right on 98.0 % of clean ones. No run with" in text
    (text,) = said(result("dbd", 0.97, 0.0))
    assert text.startswith("Trained with DBD, the network obeys the trigger on 0.0 %")
    assert "got through" not in text
    (text,) = said(result("dbd", 0.97, 0.7))
    assert "the backdoor got through." in text


def test_without_attack():
    nobody = {"asr": None, "attack": "clean", "poisoned": None, "dataset": "mine"}
    (text,) = said(result("none", 0.98, **nobody), result("dbd", 0.97, **nobody))
    assert text == (
        "Nobody knows which of these images are poisoned, so attack success cannot be measured. "
        "Accuracy on the test images is 98.0 % without defence and 97.0 % with DBD."
    )
    (text,) = said(result("dbd", 0.97, **(nobody | {"poisoned": 0})))
    assert text.startswith("These images carry no attack")


def test_a_sweep_gives_its_reach():
    results = [result("dbd", 0.9, 0.0), result("dbd", 0.8, 0.5)]
    (text,) = said(*results, variants=["split.keep=0.4", "split.keep=0.6"])
    assert "2 settings of “DBD” were run: the network obeys the trigger on 0.0 % to 50.0 %" in text


def test_groups_are_told_apart():
    texts = said(result("dbd", 0.97, 0.0), result("dbd", 0.9, 0.9, preset="other"))
    assert len(texts) == 2
    assert "preset demo" in texts[0]
    assert "preset other" in texts[1]
