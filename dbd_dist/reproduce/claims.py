"""What the article claims, as checks over the finished results of a table (Huang et al., ICLR 2022, arXiv 2202.03423,
sec. 3 and 5).

A claim is an order of figures, some of them with a margin. It holds where their means over seeds and most of the seeds
are in that order; the figures and the number of seeds that agree stand beside the verdict. Attack success says nothing
where the trigger does nothing, or where the target is never called: those have verdicts of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from data_prep.attacks import ATTACKS
from dbd_dist.craft import CRAFTS
from dbd_dist.reporting.conclusions import ASR_EFFECTIVE
from dbd_dist.reporting.wording import printable
from dbd_dist.reproduce.collect import TARGET_ACC, Made, Row, value_of

Verdict = Literal[
    "holds",
    "does not hold",
    "seeds disagree",
    "nothing to lower",
    "target lost",
    "nothing to defend",
    "not measured",
]
EFFECT = 0.02
"""How far attack success has to be above that of the same images without the trigger for it to be the trigger's."""
LOST, SELDOM = 0.1, 0.5
"""Accuracy on the target's own test images below which that class counts as lost, and is worth a word."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number of a method's results."""

    variants: tuple[str, ...]
    """Names in the table; the first that has the number. Others than the first share the stage that it is about."""
    field: str
    """In result.json, as `Row.stat` takes it: a share in 0-1."""
    title: str = ""
    """Instead of the method's."""
    plus: float = 0.0
    """A margin, added to the number."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A number that the article states."""

    share: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Figures that the article has in this order."""

    text: str
    measure: str
    """What the figures are."""
    rising: tuple[Figure | Bound, ...]
    """From the lowest to the highest: equal ones do not hold."""
    changed_labels: bool = False
    """Stated of attacks that change labels alone."""


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


def _less(variant: str, field: str, margin: float) -> Figure:
    return Figure(variants=(variant,), field=field, plus=-margin)


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
    Claim(
        text="DBD has an attack success below 2 %",
        measure=_ASR,
        rising=(*_asr("dbd"), Bound(share=0.02)),
    ),
    Claim(
        text="DBD has an accuracy within 2 points of no defence",
        measure=_ACCURACY,
        rising=(_less("none", "clean_acc", 0.02), *_accuracy("dbd")),
        changed_labels=True,
    ),
    Claim(text="DBD has a lower attack success than DPSGD", measure=_ASR, rising=_asr("dbd", "dpsgd")),
    Claim(text="... by more than 5 points", measure=_ASR, rising=(*_asr("dbd"), _less("dpsgd", "asr", 0.05))),
    Claim(
        text="... and an accuracy more than 20 points higher",
        measure=_ACCURACY,
        rising=(*_accuracy("dpsgd"), _less("dbd", "clean_acc", 0.2)),
    ),
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
"""The first six are of the ablation (sec. 5.3), the last two of what the features of both kinds look like (sec. 3), the
others of the comparison with other defences (sec. 5.2)."""


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
    lacking = [figure.variants[0] for figure in _measured(claim) if not there & set(figure.variants)]
    if lacking:
        missing = ", ".join(dict.fromkeys(lacking))
        return [Checked(claim=claim, attack="", verdict="not measured", figures=f"the table has no {missing}")]
    stated = [rows for rows in cases.values() if not (claim.changed_labels and _keeps_labels(rows))]
    return [_checked(claim, rows) for rows in stated]


def _measured(claim: Claim) -> list[Figure]:
    return [figure for figure in claim.rising if isinstance(figure, Figure)]


def _is_clean(rows: Mapping[str, Row]) -> bool:
    results = [result for row in rows.values() for result in row.results]
    return bool(results) and all(result.get("asr") is None for result in results)


def _keeps_labels(rows: Mapping[str, Row]) -> bool:
    """Whether the attack is one of those here that poison images of the target class alone."""
    names = {result.get("attack") for row in rows.values() for result in row.results}
    kinds = {**ATTACKS, **{name: craft.attack for name, craft in CRAFTS.items()}}
    return any(name in names and kind.clean_label for name, kind in kinds.items())


def _checked(claim: Claim, rows: Mapping[str, Row]) -> Checked:
    attack = next(iter(rows.values())).attack
    undefended = rows["none"].stat("asr") if "none" in rows else None
    if undefended is not None and undefended.mean < ASR_EFFECTIVE:
        figures = f"ASR without defence {_percent(undefended.mean)}"
        return Checked(claim=claim, attack=attack, verdict="nothing to defend", figures=figures)
    read = [_values(figure, rows) for figure in _measured(claim)]
    lacking = [title for title, values in read if not values]
    if lacking:
        figures = f"{lacking[0]} has no such figure"
        return Checked(claim=claim, attack=attack, verdict="not measured", figures=figures)
    shared = [seed for seed in read[0][1] if all(seed in values for _, values in read)]
    if not shared:
        return Checked(claim=claim, attack=attack, verdict="not measured", figures="no seed has all results")
    columns, measured = [], iter(read)
    for figure in claim.rising:
        if isinstance(figure, Bound):
            columns.append(("the article", [figure.share] * len(shared)))
        else:
            title, values = next(measured)
            columns.append((title, [values[seed] for seed in shared]))
    verdict, figures = _verdict(claim, columns)
    if claim.measure == _ASR and verdict != "not measured":
        verdict, said = _meaning(claim, rows, shared, verdict)
        figures += said
    return Checked(claim=claim, attack=attack, verdict=verdict, figures=figures)


def _verdict(claim: Claim, columns: list[tuple[str, list[float]]]) -> tuple[Verdict, str]:
    """From figures by seed, a column a figure, and what is said of them."""
    by_seed = list(zip(*(values for _, values in columns)))
    if claim.measure == _NEAR and all(len(set(figures)) == 1 for figures in by_seed):
        return "not measured", "true and given classes are the same"  # of clean-label attacks
    means = [sum(values) / len(values) for _, values in columns]
    shown = ", ".join(f"{title} {_percent(mean)}" for (title, _), mean in zip(columns, means))
    agree = sum(map(_rises, by_seed))
    figures = f"{shown}; in this order in {agree} of {len(by_seed)} seed{'s' if len(by_seed) != 1 else ''}"
    most = 2 * agree > len(by_seed)
    if _rises(means) != most:
        return "seeds disagree", figures
    return "holds" if most else "does not hold", figures


def _meaning(claim: Claim, rows: Mapping[str, Row], seeds: list[int], verdict: Verdict) -> tuple[Verdict, str]:
    """What an order of attack successes is worth: nothing where one that is to be higher is what the same images have
    without the trigger, or where the lowest is that of a network which does not know the target."""
    lowest, *higher = _measured(claim)
    name, least = _values(lowest, rows)
    for figure in higher:
        title, triggered = _values(replace(figure, plus=0.0), rows)
        _, untriggered = _values(replace(figure, field="asr_untriggered", plus=0.0), rows)
        have = [seed for seed in seeds if seed in untriggered]  # results of older versions lack it
        if not have or _mean(triggered, have) - _mean(untriggered, have) >= EFFECT:
            continue
        if _mean(least, seeds) - _mean(triggered, seeds) < EFFECT:  # else it is the other way round
            both = (
                f"{_percent(_mean(triggered, have))} with and {_percent(_mean(untriggered, have))} without the trigger"
            )
            return "nothing to lower", f"; {title} has {both}" + ("" if have == seeds else f" (n = {len(have)})")
    recognised = _values(replace(lowest, field=TARGET_ACC), rows)[1]
    have = [seed for seed in seeds if seed in recognised]
    share = _mean(recognised, have) if have else 1.0
    if share >= SELDOM:
        return verdict, ""
    said = f"; of the target class {name} recognises {_percent(share)}"
    return "target lost" if share < LOST and verdict == "holds" else verdict, said


def _mean(values: Mapping[int, float], seeds: list[int]) -> float:
    return sum(values[seed] for seed in seeds) / len(seeds)


def _rises(figures: Iterable[float]) -> bool:
    return all(lower < higher for lower, higher in pairwise(figures))


def _values(figure: Figure, rows: Mapping[str, Row]) -> tuple[str, dict[int, float]]:
    """What to call a figure, and its values by seed, of the first of its methods that has any; else the method's name
    and no values."""
    present = [rows[name] for name in figure.variants if name in rows]
    margin = f" less {100 * -figure.plus:g} points" if figure.plus else ""
    for row in present:
        values = {result["seed"]: value_of(result, figure.field) for result in row.results}
        values = {seed: value + figure.plus for seed, value in values.items() if value is not None}
        if values:
            return (figure.title or printable(row.method)) + margin, values
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
    counts = ", ".join(f"{kind} {found.count(kind)}" for kind in get_args(Verdict) if kind in found)
    return f"Checks of the article's claims: {counts}." if found else ""
