"""Sentences on what the truth says about a run's split, features and warm-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbd_dist.reporting import wording


def judged(results: Sequence[Mapping[str, Any]]) -> str:
    """What result.json has of `split_quality`, `after_warmup` and `feature_quality`, as means over the runs; empty
    where there is nothing. Not escaped."""

    def mean(*path: str) -> str | None:
        values = [value for value in (_fraction(result, path) for result in results) if value is not None]
        return wording.percent(sum(values) / len(values)) if values else None

    parts = []
    first, last = mean("split_quality", "first", "auroc"), mean("split_quality", "last", "auroc")
    if first and last:
        parts.append(f"AUROC of the first split {first}, of the last {last}")
    hits, alarms = mean("split_quality", "last", "tpr"), mean("split_quality", "last", "fpr")
    if alarms:
        poisoned = f"{hits} of the poisoned and " if hits else ""
        parts.append(f"the last split drops the labels of {poisoned}{alarms} of the other images")
    accuracy, success = mean("after_warmup", "clean_acc"), mean("after_warmup", "asr")
    if accuracy:
        parts.append(
            f"after the warm-up accuracy {accuracy}" + (f" and attack success {success}" if success else "")
        )  # fmt: skip
    neighbours = mean("feature_quality", "knn_acc")
    if neighbours:
        parts.append(f"k-NN accuracy of the {_kind(results)} features {neighbours}")
    true, given = mean("feature_quality", "poisoned_near_true"), mean("feature_quality", "poisoned_near_given")
    if true and given:
        parts.append(
            f"neighbours of a poisoned image have its true class in {true} and its given one in {given} of cases"
        )
    return "; ".join(parts)


def _kind(results: Sequence[Mapping[str, Any]]) -> str:
    quality = results[0].get("feature_quality")
    return "self-supervised" if isinstance(quality, Mapping) and quality.get("kind") == "ssl" else "supervised"


def _fraction(result: Mapping[str, Any], path: Sequence[str]) -> float | None:
    """A number from 0 to 1 in nested objects; None where there is no such number."""
    value: Any = result
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return float(value) if fits else None
