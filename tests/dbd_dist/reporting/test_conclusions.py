"""The sentence at the top: right for every case, and no success where there is none."""

from __future__ import annotations

import pytest

from dbd_dist.reporting.conclusions import conclusions
from dbd_dist.reporting.tables import aggregate


def result(method, clean_acc, asr=None, seed=0, **more):
    return {
        "method": method, "preset": "demo", "dataset": f"digits-badnets-r0.05-t3-s{seed}", "attack": "badnets",
        "seed": seed, "clean_acc": clean_acc, "asr": asr, "poisoned": 72, "train_size": 1438,
    } | more  # fmt: skip


def of(*results, variants=None):
    return conclusions(aggregate(results, variants))


def test_success():
    assert of(result("none", 0.983, 0.994), result("dbd", 0.972, 0.0)) == [
        "Without defence the attack success rate (ASR) is 99.4 %; DBD brings it to 0.0 % for 1.1 points of clean "
        "accuracy (97.2 % remain)."
    ]


@pytest.mark.parametrize(
    ("clean_acc", "words"),
    [
        (0.983, "brings it to 1.0 % at the same clean accuracy (98.3 %)."),
        (0.990, "brings it to 1.0 %, and clean accuracy rises by 0.7 points, to 99.0 %."),
        (0.365, "brings it to 1.0 %, but clean accuracy falls by 61.8 points, to 36.5 %."),
    ],
)
def test_price(clean_acc, words):
    (text,) = of(result("none", 0.983, 0.994), result("dbd", clean_acc, 0.01))
    assert words in text


@pytest.mark.parametrize(
    ("plain", "defended", "words"),
    [
        (0.99, 0.06, "lowers it to 6.0 %: the backdoor is weaker, not gone."),
        (0.99, 0.60, "with DBD it is still at 60.0 %: the defence did not hold."),
        (0.31, 0.51, "with DBD it is even higher at 51.0 %: the defence did not hold."),
        (0.05, 0.02, "The attack hardly works here"),
        (0.05, 0.90, "so DBD made it worse."),
    ],
)
def test_no_success_is_claimed(plain, defended, words):
    (text,) = of(result("none", 0.98, plain), result("dbd", 0.97, defended))
    assert words in text
    assert "brings" not in text


def test_seeds_give_the_range():
    (text,) = of(
        *(result("none", 0.98, asr, seed) for seed, asr in enumerate((0.98, 1.0))),
        *(result("dbd", 0.97, asr, seed) for seed, asr in enumerate((0.0, 0.01))),
    )
    assert "99.0 % (98.0 % to 100.0 % over seeds 0, 1)" in text
    assert "DBD brings it to 0.5 % (0.0 % to 1.0 % over seeds 0, 1) for 1.0 points" in text


def test_seeds_that_agree_give_no_range():
    (text,) = of(*(result(m, 0.97, asr, seed) for m, asr in (("none", 1.0), ("dbd", 0.0)) for seed in (0, 1)))
    assert "DBD brings it to 0.0 % (seeds 0, 1) at the same clean accuracy" in text


def test_one_bad_seed_is_named():
    plain = [result("none", 0.98, 0.99, seed) for seed in range(20)]
    good = [result("dbd", 0.97, 0.0, seed) for seed in range(19)]
    (text,) = of(*plain, *good, result("dbd", 0.97, 0.8, 19))
    assert "4.0 % on average, but not in every run: the highest is 80.0 %" in text


def test_single_runs():
    (text,) = of(result("none", 0.98, 0.99))
    assert text == (
        "Without defence the attack success rate (ASR) is 99.0 % and clean accuracy 98.0 %. "
        "No run with a defence is here to compare with."
    )
    (text,) = of(result("dbd", 0.97, 0.0))
    assert text.startswith("With DBD the attack success rate (ASR) is 0.0 % and clean accuracy 97.0 %. ")
    (text,) = of(result("dbd", 0.97, 0.7))
    assert "clean accuracy 97.0 %: the backdoor remains." in text


def test_without_attack():
    unknown = {"asr": None, "attack": "clean", "poisoned": None, "dataset": "mine"}
    (text,) = of(result("none", 0.98, **unknown), result("dbd", 0.97, **unknown))
    assert text == (
        "It is not known which of these images are poisoned, so attack success cannot be measured. "
        "Accuracy on the test images is 98.0 % without defence and 97.0 % with DBD."
    )
    (text,) = of(result("dbd", 0.97, **(unknown | {"poisoned": 0})))
    assert text.startswith("These images carry no attack")


def test_a_sweep_gives_its_range():
    results = [result("dbd", 0.9, 0.0), result("dbd", 0.8, 0.5)]
    (text,) = of(*results, variants=["split.keep=0.4", "split.keep=0.6"])
    assert text == (
        "2 settings of “DBD”: the attack success rate (ASR) is 0.0 % to 50.0 %, clean accuracy 80.0 % to 90.0 %."
    )


def test_several_methods_have_a_sentence_each():
    (text,) = of(result("none", 0.98, 0.99), result("dbd", 0.97, 0.0), result("theirs", 0.9, 0.5))
    assert text.split(". ")[0].startswith("Without defence the attack success rate (ASR) is 99.0 %")
    assert "With DBD the attack success rate (ASR) is 0.0 %" in text
    assert "With theirs the attack success rate (ASR) is 50.0 % and clean accuracy 90.0 %: the backdoor remains" in text


def test_a_method_that_records_no_defence_is_the_baseline():
    """The baseline is what result.json says, whatever its name."""
    (text,) = of(result("erm", 0.98, 0.99, defends=False), result("dbd", 0.97, 0.0))
    assert text.startswith("Without defence the attack success rate (ASR) is 99.0 %; DBD brings it to 0.0 %")


def test_groups_are_told_apart():
    texts = of(result("dbd", 0.97, 0.0), result("dbd", 0.9, 0.9, preset="other"))
    assert len(texts) == 2
    assert "preset demo" in texts[0]
    assert "preset other" in texts[1]
