"""What came out, in a sentence with the numbers. It claims no success that the numbers do not show in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dbd_dist.reporting import names, wording
from dbd_dist.reporting.tables import Row, grouped, title
from dbd_dist.reporting.wording import percent, printable

ASR_EFFECTIVE = 0.2
"""ASR from which the attack is said to work: among ten classes, an unpoisoned network calls a few percent of images the
target by mistake."""
ASR_DEFENDED = 0.05
"""ASR up to which a defence is said to hold."""
ACCURACY_COSTLY = 0.05
"""Loss of clean accuracy from which its price comes with a "but"."""


def conclusions(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence or two for every group of rows that can be compared; not escaped.

    Args:
        rows: from `tables.aggregate`.
        results: what they were made of.
    """
    groups = grouped(rows)
    return [(f"{title(group[0])}: " if len(groups) > 1 else "") + _group(group, results) for group in groups]


def _group(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    plain = [row for row in rows if not row.defends]
    defended = [row for row in rows if row.defends]
    if any(row.asr is None for row in rows):
        return _unattacked(rows)
    if len(plain) > 1 or len(defended) > 1:
        methods = dict.fromkeys(row.method for row in rows)
        return " ".join(_many([row for row in rows if row.method == method], results) for method in methods)
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
    return printable(names.method_name(row.method), 40)


def _pair(plain: Row, defended: Row, results: Sequence[Mapping[str, Any]]) -> str:
    name, asr = _name(defended), _share(defended, results, "asr")
    values = _values(defended, results, "asr")
    before, after = _mean(plain, results, "asr"), sum(values) / len(values)
    accuracies = _accuracies(plain, defended, results)
    first = f"Without defence the attack success rate (ASR) is {_share(plain, results, 'asr')}"
    if before < ASR_EFFECTIVE:
        first = f"The attack hardly works here. {first}; with {name} it is {asr}"
        return f"{first}, so {name} made it worse." if after >= ASR_EFFECTIVE else f"{first}. {accuracies}"
    if max(values) <= ASR_DEFENDED:
        return f"{first}; {name} brings it to {asr}{_price(plain, defended, results)}."
    if after <= ASR_DEFENDED:
        return (
            f"{first}; {name} brings it to {percent(after)} on average, but not in every run: the highest is "
            f"{percent(max(values))}. {accuracies}"
        )
    if after <= before / 2:
        return f"{first}; {name} lowers it to {asr}: the backdoor is weaker, not gone. {accuracies}"
    still = "even higher" if after > before else "still"
    return f"{first}; with {name} it is {still} at {asr}: the defence did not hold."


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
    method = f"With {_name(row)}" if row.defends else "Without defence"
    text = f"{method} the attack success rate (ASR) is {asr} and clean accuracy {accuracy}"
    values = _values(row, results, "asr")
    if row.defends and max(values) > ASR_DEFENDED:
        text += ": the backdoor remains" + ("" if min(values) > ASR_DEFENDED else " in some of the runs")
    return text + "."


def _many(rows: Sequence[Row], results: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one method that differ in settings: the range of their means."""
    if len(rows) == 1:
        return _alone(rows[0], results)
    ranges = []
    for field in ("asr", "clean_acc"):
        means = [_mean(row, results, field) for row in rows]
        ranges.append(f"{percent(min(means))} to {percent(max(means))}")
    return (
        f"{len(rows)} settings of “{_name(rows[0])}”: the attack success rate (ASR) is {ranges[0]}, clean accuracy "
        f"{ranges[1]}."
    )


def _unattacked(rows: Sequence[Row]) -> str:
    untrusted = any(row.poisoned is None for row in rows)
    first = (
        "It is not known which of these images are poisoned, so attack success cannot be measured."
        if untrusted
        else "These images carry no attack, so there is no attack success to measure."
    )
    shares = [
        f"{percent(row.clean_acc.mean)} {f'with {_name(row)}' if row.defends else 'without defence'}"
        + (f" ({printable(row.variant, 120)})" if row.variant else "")
        for row in rows[:6]
        if row.clean_acc is not None
    ]
    more = f" and {len(rows) - 6} more settings" if len(rows) > 6 else ""
    return f"{first} Accuracy on the test images is {wording.joined(shares)}{more}."
