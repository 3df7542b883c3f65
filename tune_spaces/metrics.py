"""What trials are judged by, in which direction, and what of it a defender could know."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError

TRUTH = {"score": True, "clean_acc": True, "asr": False, "robust_acc": True, "kept_poisoned": False}
"""Metrics that need true labels or poison flags -> whether higher is better. score: clean_acc minus asr."""
DEFENDER = {"withheld_agreement": True, "split_stability": True, "loss_gap": True, "knn_agreement": True}
"""Metrics without the truth, see `dbd_dist.evaluation.defender`."""
ATTACK = {
    "asr": True, "asr_none": True, "asr_warmup": True, "first_auroc": False, "clustering": False, "psnr_db": True,
    "ssim": True, "clean_acc": False,
}  # fmt: skip
"""Metrics of trials that vary an attack, for the attacker. asr: under the defence; asr_none: without one; asr_warmup:
of the defence's warm-up; first_auroc: how well its first split tells poisoned samples from others, which says how near
an attack comes where none gets through; clustering: distance of poisoned features to their own centre over that
centre's distance to the benign ones, comparable among trials with one craft.distance."""
WITHHELD = 0.1
"""Share of the labels that `--truth none` withholds from fine-tuning."""


@dataclass(frozen=True)
class Metric:
    """Something to optimise."""

    name: str
    up: bool
    """Higher is better."""

    def signed(self, metrics: Mapping[str, Any]) -> float | None:
        """Its value, higher is better; None where the trial has none."""
        value = metrics.get(self.name)
        if value is None or not math.isfinite(value):
            return None
        return float(value) if self.up else -float(value)


def find(names: Sequence[str], *, truth: bool, attacks: bool) -> tuple[Metric, ...]:
    """The metrics of those names; the default where there is none.

    Args:
        truth: whether what needs the truth may be optimised.
        attacks: whether trials vary an attack.

    Raises:
        UserError: no trial reports it, it needs the truth and may not, or it is there twice.
    """
    there = ATTACK if attacks else TRUTH | DEFENDER
    names = names or [("asr" if attacks else "score") if truth else "withheld_agreement"]
    found: list[Metric] = []
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise UserError(f"no trial reports {name!r}", where="--metric", expected=", ".join(there), hint=hint)
        if not truth and name not in DEFENDER:
            raise UserError(
                f"{name} needs the truth", where="--truth none", expected=f"--metric {' or '.join(DEFENDER)}"
            )
        found.append(Metric(name, there[name]))
    if len(set(names)) != len(names):
        raise UserError("a metric is named twice", where="--metric")
    return tuple(found)


def with_score(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with "score", where clean accuracy was measured."""
    if metrics.get("clean_acc") is None:
        return dict(metrics)
    return {**metrics, "score": metrics["clean_acc"] - (metrics.get("asr") or 0.0)}


def mean(of_seeds: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, float]]:
    """Means over seeds, and standard deviations (of the sample) where there are several; a metric that one seed lacks
    is left out."""
    names = [name for name in of_seeds[0] if all(one.get(name) is not None for one in of_seeds)]
    means = {name: sum(one[name] for one in of_seeds) / len(of_seeds) for name in names}
    if len(of_seeds) < 2:
        return dict(of_seeds[0]), {}
    spread = {
        name: math.sqrt(sum((one[name] - means[name]) ** 2 for one in of_seeds) / (len(of_seeds) - 1)) for name in names
    }
    return means, spread


def front(values: Sequence[Sequence[float]]) -> list[int]:
    """Which points no other dominates: none is at least as good in everything and better in something (higher is
    better)."""

    def dominated(one: Sequence[float]) -> bool:
        return any(all(o >= v for o, v in zip(other, one)) and tuple(other) != tuple(one) for other in values)

    return [i for i, one in enumerate(values) if not dominated(one)]


def rank_correlation(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs or where one side does not vary."""
    first, second = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(first, second)[0])  # type: ignore[arg-type]


def proxies(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float | None]]:
    """How each metric of the defender ranks finished trials whose truth is known: name -> (trials, Spearman's rank
    correlation with the score)."""
    found = {}
    for name in DEFENDER:
        both = [
            (row["metrics"][name], row["metrics"]["score"])
            for row in rows
            if row["status"] == "finished" and None not in (row["metrics"].get(name), row["metrics"].get("score"))
        ]
        if both:
            found[name] = (len(both), rank_correlation(both))
    return found
