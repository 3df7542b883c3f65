"""What the article claims, as checks over the finished results of a table (Huang et al., ICLR 2022, arXiv 2202.03423,
sec. 3 and 5).

A claim is an order of figures: its verdict is that of their means over seeds, whatever the distance between them, so
the figures and the number of seeds that agree stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dbd_dist.reporting.conclusions import ASR_EFFECTIVE
from dbd_dist.reporting.wording import printable
from dbd_dist.reproduce.collect import Made, Row, value_of

Verdict = Literal["holds", "does not hold", "nothing to defend", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a method's results."""

    variants: tuple[str, ...]
    """Names in the table; the first that has the number. Others than the first share the stage that it is about."""
    field: str
    """In result.json, as `Row.stat` takes it: a share in 0-1."""
    title: str = ""
    """Instead of the method's."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Figures that the article has in this order."""

    text: str
    measure: str
    """What the figures are."""
    rising: tuple[Figure, ...]
    """From the lowest to the highest: equal ones do not hold."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A claim under one attack, or under none where the table lacks its methods."""

    claim: Claim
    attack: str
    """For people, not escaped; empty where the table lacks the methods."""
    verdict: Verdict
    figures: str
    """The numbers behind the verdict, or what is missing."""


def _asr(*variants: str) -> tuple[Figure, ...]:
    return tuple(Figure(variants=(variant,), field="asr") for variant in variants)


def _accuracy(*variants: str) -> tuple[Figure, ...]:
    return tuple(Figure(variants=(variant,), field="clean_acc") for variant in variants)


_ASR, _ACCURACY, _AUROC = "ASR %", "clean acc. %", "AUROC of the first split, %"
_NEAR = "neighbours of poisoned samples, %"
_FIRST = "split_quality.first.auroc"
_TRUE, _GIVEN = "feature_quality.poisoned_near_true", "feature_quality.poisoned_near_given"
_SSL = ("dbd", "ssl-sce-tuned", "ssl-sce", "ssl-ce")
"""Methods whose result.json describes the features of the one self-supervised backbone that they share."""

CLAIMS: tuple[Claim, ...] = (
    Claim(
        text="Decoupling alone lowers attack success: against no defence",
        measure=_ASR,
        rising=_asr("ssl-ce", "none"),
    ),
    Claim(
        text="Decoupling alone lowers attack success: against DBD on supervised features",
        measure=_ASR,
        rising=_asr("ssl-ce", "dbd-no-ssl"),
    ),
    Claim(
        text="Symmetric cross-entropy separates poisoned samples better than cross-entropy",
        measure=_AUROC,
        rising=(
            Figure(variants=("ssl-ce",), field=_FIRST, title="CE"),
            # the head of all three is the same, and so is the split that it leads to first
            Figure(variants=("ssl-sce", "ssl-sce-tuned", "dbd"), field=_FIRST, title="SCE"),
        ),
    ),
    Claim(
        text="Dropping low-credible samples lowers attack success",
        measure=_ASR,
        rising=_asr("ssl-sce-tuned", "ssl-sce"),
    ),
    Claim(text="... and accuracy", measure=_ACCURACY, rising=_accuracy("ssl-sce-tuned", "ssl-sce")),
    Claim(
        text="Semi-supervised fine-tuning wins the accuracy back",
        measure=_ACCURACY,
        rising=_accuracy("ssl-sce-tuned", "dbd"),
    ),
    Claim(text="DBD has a lower attack success than DPSGD", measure=_ASR, rising=_asr("dbd", "dpsgd")),
    Claim(text="DBD has a lower attack success than ShrinkPad", measure=_ASR, rising=_asr("dbd", "shrinkpad")),
    Claim(text="NC lies between DBD and no defence", measure=_ASR, rising=_asr("dbd", "nc", "none")),
    Claim(text="NAD lies between DBD and no defence", measure=_ASR, rising=_asr("dbd", "nad", "none")),
    Claim(
        text="Self-supervised features put poisoned samples among their true class",
        measure=_NEAR,
        rising=(
            Figure(variants=_SSL, field=_GIVEN, title="given class"),
            Figure(variants=_SSL, field=_TRUE, title="true class"),
        ),
    ),
    Claim(
        text="Supervised features put them among those that are given the same label",
        measure=_NEAR,
        rising=(
            Figure(variants=("none",), field=_TRUE, title="true class"),
            Figure(variants=("none",), field=_GIVEN, title="given class"),
        ),
    ),
)
"""The first six are of the ablation (sec. 5.3), the last two of what the features of both kinds look like (sec. 3)."""


def check(made: Made) -> list[Checked]:
    """Every claim under every attack of the table; empty where the table can say nothing of any.

    Returns:
        For each claim, in order: its attacks in the table's order, or one line where its methods are not in the table.
        An attack that does not reach `ASR_EFFECTIVE` without defence is "nothing to defend"; clean data is left out.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in made.rows:
        cases.setdefault(row.case, {})[row.variant] = row
    attacked = {case: rows for case, rows in cases.items() if case != "clean" and not _is_clean(rows)}
    found = [checked for claim in CLAIMS for checked in _claim(claim, made, attacked)]
    return found if any(checked.verdict != "not measured" for checked in found) else []


def _claim(claim: Claim, made: Made, cases: Mapping[str, Mapping[str, Row]]) -> list[Checked]:
    there = {method["name"] for method in made.about["methods"]}
    lacking = [figure.variants[0] for figure in claim.rising if not there & set(figure.variants)]
    if lacking:
        missing = ", ".join(dict.fromkeys(lacking))
        return [Checked(claim=claim, attack="", verdict="not measured", figures=f"the table has no {missing}")]
    return [_checked(claim, rows) for rows in cases.values()]


def _is_clean(rows: Mapping[str, Row]) -> bool:
    results = [result for row in rows.values() for result in row.results]
    return bool(results) and all(result.get("asr") is None for result in results)


def _checked(claim: Claim, rows: Mapping[str, Row]) -> Checked:
    attack = next(iter(rows.values())).attack
    undefended = rows["none"].stat("asr") if "none" in rows else None
    if undefended is not None and undefended.mean < ASR_EFFECTIVE:
        figures = f"ASR without defence {_percent(undefended.mean)}"
        return Checked(claim=claim, attack=attack, verdict="nothing to defend", figures=figures)
    titles, found = [], []
    for figure in claim.rising:
        title, values = _values(figure, rows)
        if not values:
            return Checked(claim=claim, attack=attack, verdict="not measured", figures=f"{title} has no such figure")
        titles.append(title)
        found.append(values)
    shared = [seed for seed in found[0] if all(seed in values for values in found)]
    if not shared:
        return Checked(claim=claim, attack=attack, verdict="not measured", figures="no seed has all results")
    return _verdict(claim, attack, titles, [[values[seed] for seed in shared] for values in found])


def _verdict(claim: Claim, attack: str, titles: list[str], columns: list[list[float]]) -> Checked:
    """From figures by seed, a column a figure."""
    by_seed = list(zip(*columns))
    if claim.measure == _NEAR and all(len(set(figures)) == 1 for figures in by_seed):
        figures = "true and given classes are the same"  # of clean-label attacks
        return Checked(claim=claim, attack=attack, verdict="not measured", figures=figures)
    means = [sum(column) / len(column) for column in columns]
    shown = ", ".join(f"{title} {_percent(mean)}" for title, mean in zip(titles, means))
    agree = sum(map(_rises, by_seed))
    figures = f"{shown}; in this order in {agree} of {len(by_seed)} seed{'s' if len(by_seed) != 1 else ''}"
    return Checked(claim=claim, attack=attack, verdict="holds" if _rises(means) else "does not hold", figures=figures)


def _rises(figures: list[float] | tuple[float, ...]) -> bool:
    return all(lower < higher for lower, higher in pairwise(figures))


def _values(figure: Figure, rows: Mapping[str, Row]) -> tuple[str, dict[int, float]]:
    """What to call a figure, and its values by seed, of the first of its methods that has any; else the method's name
    and no values."""
    present = [rows[name] for name in figure.variants if name in rows]
    for row in present:
        values = {result["seed"]: value_of(result, figure.field) for result in row.results}
        values = {seed: value for seed, value in values.items() if value is not None}
        if values:
            return figure.title or printable(row.method), values
    return printable(present[0].method) if present else figure.variants[0], {}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


HEAD = ("claim", "attack", "verdict", "figures")


def cells(made: Made) -> list[list[str]]:
    """A line for every check, below `HEAD`; names of strangers are made safe to show, not escaped."""
    return [
        [f"{each.claim.text} ({each.claim.measure})", printable(each.attack) or "–", each.verdict, each.figures]
        for each in check(made)
    ]


def summary(made: Made) -> str:
    """How many checks came out how, in a sentence; empty where there are none."""
    found = [each.verdict for each in check(made)]
    kinds: tuple[Verdict, ...] = ("holds", "does not hold", "nothing to defend", "not measured")
    counts = ", ".join(f"{kind} {found.count(kind)}" for kind in kinds if kind in found)
    return f"Checks of the article's claims: {counts}." if found else ""
