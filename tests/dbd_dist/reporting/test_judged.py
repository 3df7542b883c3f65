"""Sentences on splits, features and the warm-up."""

from __future__ import annotations

import pytest

from dbd_dist.reporting.judged import judged

RESULT = {
    "split_quality": {"first": {"auroc": 0.9}, "last": {"auroc": 1.0, "tpr": 0.75, "fpr": 0.5}},
    "after_warmup": {"clean_acc": 0.6, "asr": 0.25},
    "feature_quality": {"kind": "ssl", "knn_acc": 0.8, "poisoned_near_true": 0.7, "poisoned_near_given": 0.1},
}


def test_means_over_runs_in_words():
    other = {**RESULT, "split_quality": {**RESULT["split_quality"], "first": {"auroc": 0.8}}}
    assert judged([RESULT, other]) == (
        "AUROC of the first split 85.0 %, of the last 100.0 %; the last split drops the labels of 75.0 % of the "
        "poisoned and 50.0 % of the other images; after the warm-up accuracy 60.0 % and attack success 25.0 %; "
        "k-NN accuracy of the self-supervised features 80.0 %; neighbours of a poisoned image have its true class in "
        "70.0 % and its given one in 10.0 % of cases"
    )


@pytest.mark.parametrize("value", [None, "x", True, -1, 2, 10**400, float("nan"), [], {"first": 3}])
def test_what_is_no_such_result_is_passed_over(value):
    assert judged([{"split_quality": value, "after_warmup": {"clean_acc": value}, "feature_quality": value}]) == ""


def test_clean_data_shows_false_alarms():
    quality = {"last": {"auroc": None, "tpr": None, "fpr": 0.15}}
    assert judged([{"split_quality": quality}]) == "the last split drops the labels of 15.0 % of the other images"
