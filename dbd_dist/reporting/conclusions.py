"""What came out, in a sentence with the numbers. It claims no success that the numbers do not show in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbd_dist.reporting import wording
from dbd_dist.reporting.tables import FIRST, Row, title
from dbd_dist.reporting.wording import percent, printable

ASR_EFFECTIVE = 0.2
"""Attack success from which the trigger is said to work: among ten classes, an unpoisoned network calls a few percent
of images the target by mistake."""
ASR_DEFENDED = 0.05
"""Attack success up to which a defence is said to hold."""
ACCURACY_COSTLY = 0.05
"""Loss of clean accuracy from which its price comes with a "but"."""


def verdicts(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence or two for every group of rows that can be compared; not escaped.

    Args:
        rows: from `tables.aggregate`.
        results: what they were made of.
    """
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    several = len(groups) > 1
    return [(f"{title(group[0])}: " if several else "") + _group(group, results) for group in groups.values()]


def _group(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    plain = [row for row in rows if row.method == FIRST]
    defended = [row for row in rows if row.method != FIRST]
    if any(row.asr is None for row in rows):
        return _unattacked(rows)
    if len(plain) > 1 or len(defended) > 1:
        return _many(plain, results) + _many(defended, results)
    if not defended:
        return _alone(plain[0], results) + " No run with a defence is here to compare with."
    if not plain:
        return _alone(defended[0], results) + " No run without defence is here to compare with."
    return _pair(plain[0], defended[0], results)


def _values(row: Row, results: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    return [results[i][field] for i in row.members if results[i].get(field) is not None]


def _share(row: Row, results: Sequence[Mapping[str, Any]], field: str) -> str:
    """ "97.2 %", or over runs "97.2 % (97.0 % to 97.5 % over seeds 0–4)"."""
    values = _values(row, results, field)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return percent(mean)
    over = wording.seeds(row.seeds) if len(set(row.seeds)) == len(values) else f"{len(values)} runs"
    low, high = percent(min(values)), percent(max(values))
    return f"{percent(mean)} ({over})" if low == high else f"{percent(mean)} ({low} to {high} over {over})"


def _name(row: Row) -> str:
    return printable(wording.method_name(row.method), 40)


def _trained(row: Row) -> str:
    return "Trained plainly" if row.method == FIRST else f"Trained with {_name(row)}"


def _pair(plain: Row, defended: Row, results: Sequence[Mapping[str, Any]]) -> str:
    name, plain_asr = _name(defended), _share(plain, results, "asr")
    asr = _share(defended, results, "asr")
    values = _values(defended, results, "asr")
    before, after = _mean(plain, results, "asr"), sum(values) / len(values)
    if before < ASR_EFFECTIVE:
        first = f"The attack hardly works here: trained plainly, the network obeys the trigger on {plain_asr} of "
        first += f"triggered images; with {name} it does so on {asr}"
        if after >= ASR_EFFECTIVE:
            return f"{first}, so {name} made it worse."
        return f"{first}. {_accuracies(plain, defended, results)}"
    first = f"Trained plainly, the network obeys the trigger on {plain_asr} of triggered images; "
    if max(values) <= ASR_DEFENDED:
        return f"{first}{name} brings that to {asr}{_price(plain, defended, results)}."
    if after <= ASR_DEFENDED:
        return (
            f"{first}{name} brings that to {percent(after)} on average, but not in every run: at worst it is "
            f"{percent(max(values))}. {_accuracies(plain, defended, results)}"
        )
    if after <= before / 2:
        return (
            f"{first}{name} lowers that to {asr}: the backdoor is weaker, not gone. "
            f"{_accuracies(plain, defended, results)}"
        )
    still = "even does so" if after > before else "still does so"
    return f"{first}with {name} it {still} on {asr}: the defence did not hold."


def _mean(row: Row, results: Sequence[Mapping[str, Any]], field: str) -> float:
    values = _values(row, results, field)
    return sum(values) / len(values)


def _price(plain: Row, defended: Row, results: Sequence[Mapping[str, Any]]) -> str:
    after = _mean(defended, results, "clean_acc")
    cost = _mean(plain, results, "clean_acc") - after
    points = f"{100 * abs(cost):.1f} points"
    if cost >= ACCURACY_COSTLY:
        return f", but clean accuracy falls by {points}, to {percent(after)}"
    if abs(cost) < 0.0005:
        return f" at the same clean accuracy ({percent(after)})"
    if cost < 0:
        return f", and clean accuracy rises by {points}, to {percent(after)}"
    return f" for {points} of clean accuracy ({percent(after)} remain)"


def _accuracies(plain: Row, defended: Row, results: Sequence[Mapping[str, Any]]) -> str:
    before, after = (percent(_mean(row, results, "clean_acc")) for row in (plain, defended))
    return f"Clean accuracy is {before} without defence and {after} with {_name(defended)}."


def _alone(row: Row, results: Sequence[Mapping[str, Any]]) -> str:
    asr, accuracy = _share(row, results, "asr"), _share(row, results, "clean_acc")
    text = f"{_trained(row)}, the network obeys the trigger on {asr} of triggered images and is right on {accuracy} of "
    text += "clean ones"
    values = _values(row, results, "asr")
    if row.method != FIRST and max(values) > ASR_DEFENDED:
        failed = "the backdoor got through" if len(values) == 1 else "the backdoor got through in some of the runs"
        if min(values) > ASR_DEFENDED:
            failed = "the backdoor got through"
        text += f": {failed}"
    return text + "."


def _many(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    """Rows that differ in settings: how far they reach."""
    if not rows:
        return ""
    if len(rows) == 1:
        return _alone(rows[0], results) + " "
    names = wording.joined(dict.fromkeys(_name(row) for row in rows))
    reach = []
    for field in ("asr", "clean_acc"):
        means = [_mean(row, results, field) for row in rows]
        reach.append(f"{percent(min(means))} to {percent(max(means))}")
    return (
        f"{len(rows)} settings of “{names}” were run: the network obeys the trigger on {reach[0]} of triggered images "
        f"and is right on {reach[1]} of clean ones. "
    )


def _unattacked(rows: Sequence[Row]) -> str:
    untrusted = any(row.poisoned is None for row in rows)
    first = (
        "Nobody knows which of these images are poisoned, so attack success cannot be measured."
        if untrusted
        else "These images carry no attack, so there is no attack success to measure."
    )
    shares = [
        f"{percent(row.clean_acc.mean)} {'without defence' if row.method == FIRST else f'with {_name(row)}'}"
        + (f" ({printable(row.variant, 120)})" if row.variant else "")
        for row in rows[:6]
        if row.clean_acc is not None
    ]
    more = f" and {len(rows) - 6} more settings" if len(rows) > 6 else ""
    return f"{first} Accuracy on the test images is {wording.joined(shares)}{more}."
