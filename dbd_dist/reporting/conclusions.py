"""What came out, in a sentence with the numbers. It claims no success that the numbers do not show in every run."""

from __future__ import annotations

from collections.abc import Sequence

from dbd_dist.reporting import wording
from dbd_dist.reporting.tables import Row, group_title, grouped
from dbd_dist.reporting.wording import percent, printable

ASR_EFFECTIVE = 0.2
"""ASR from which the attack is said to work: among ten classes, an unpoisoned network calls a few percent of images the
target by mistake."""
ASR_DEFENDED = 0.05
"""ASR up to which a defence is said to hold."""
ACCURACY_COSTLY = 0.05
"""Loss of clean accuracy from which its price comes with a "but"."""


def conclusions(rows: Sequence[Row]) -> list[str]:
    """A sentence or two for every group of rows that can be compared; not escaped.

    Args:
        rows: from `tables.aggregate`.
    """
    groups = grouped(rows)
    return [(f"{group_title(group[0])}: " if len(groups) > 1 else "") + _group(group) for group in groups]


def _group(rows: Sequence[Row]) -> str:
    plain = [row for row in rows if not row.defends]
    defended = [row for row in rows if row.defends]
    if any(not row.values("asr") for row in rows):
        return _unattacked(rows)
    if len(plain) > 1 or len(defended) > 1:
        methods = dict.fromkeys(row.method for row in rows)
        return " ".join(_many([row for row in rows if row.method == method]) for method in methods)
    if not defended:
        return _alone(plain[0]) + " No run with a defence is here to compare with."
    if not plain:
        return _alone(defended[0]) + " No run without defence is here to compare with."
    return _pair(plain[0], defended[0])


def _share(row: Row, field: str) -> str:
    """ "97.2 %", or over runs "97.2 % (97.0 % to 97.5 % over seeds 0–4)"."""
    values = row.values(field)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return percent(mean)
    over = wording.seeds(row.seeds) if len(set(row.seeds)) == len(values) else f"{len(values)} runs"
    low, high = percent(min(values)), percent(max(values))
    return f"{percent(mean)} ({over})" if low == high else f"{percent(mean)} ({low} to {high} over {over})"


def _pair(plain: Row, defended: Row) -> str:
    name, asr = defended.title, _share(defended, "asr")
    values = defended.values("asr")
    before, after = _mean(plain, "asr"), sum(values) / len(values)
    accuracies = _accuracies(plain, defended)
    first = f"Without defence the attack success rate (ASR) is {_share(plain, 'asr')}"
    if before < ASR_EFFECTIVE:
        first = f"The attack hardly works here. {first}; with {name} it is {asr}"
        return f"{first}, so {name} made it worse." if after >= ASR_EFFECTIVE else f"{first}. {accuracies}"
    if max(values) <= ASR_DEFENDED:
        return f"{first}; {name} brings it to {asr}{_price(plain, defended)}."
    if after <= ASR_DEFENDED:
        return (
            f"{first}; {name} brings it to {percent(after)} on average, but not in every run: the highest is "
            f"{percent(max(values))}. {accuracies}"
        )
    if after <= before / 2:
        return f"{first}; {name} lowers it to {asr}: the backdoor is weaker, not gone. {accuracies}"
    still = "even higher" if after > before else "still"
    return f"{first}; with {name} it is {still} at {asr}: the defence did not hold."


def _mean(row: Row, field: str) -> float:
    values = row.values(field)
    return sum(values) / len(values)


def _price(plain: Row, defended: Row) -> str:
    after = _mean(defended, "clean_acc")
    cost = _mean(plain, "clean_acc") - after
    points = f"{100 * abs(cost):.1f} points"
    if cost >= ACCURACY_COSTLY:
        return f", but clean accuracy falls by {points}, to {percent(after)}"
    if abs(cost) < 0.0005:
        return f" at the same clean accuracy ({percent(after)})"
    if cost < 0:
        return f", and clean accuracy rises by {points}, to {percent(after)}"
    return f" for {points} of clean accuracy ({percent(after)} remain)"


def _accuracies(plain: Row, defended: Row) -> str:
    before, after = (percent(_mean(row, "clean_acc")) for row in (plain, defended))
    return f"Clean accuracy is {before} without defence and {after} with {defended.title}."


def _alone(row: Row) -> str:
    asr, accuracy = _share(row, "asr"), _share(row, "clean_acc")
    method = f"With {row.title}" if row.defends else "Without defence"
    text = f"{method} the attack success rate (ASR) is {asr} and clean accuracy {accuracy}"
    values = row.values("asr")
    if row.defends and max(values) > ASR_DEFENDED:
        text += ": the backdoor remains" + ("" if min(values) > ASR_DEFENDED else " in some of the runs")
    return text + "."


def _many(rows: Sequence[Row]) -> str:
    """Rows of one method that differ in settings: the range of their means."""
    if len(rows) == 1:
        return _alone(rows[0])
    ranges = []
    for field in ("asr", "clean_acc"):
        means = [_mean(row, field) for row in rows]
        ranges.append(f"{percent(min(means))} to {percent(max(means))}")
    return (
        f"{len(rows)} settings of “{rows[0].title}”: the attack success rate (ASR) is {ranges[0]}, clean accuracy "
        f"{ranges[1]}."
    )


def _unattacked(rows: Sequence[Row]) -> str:
    untrusted = any(not row.values("poisoned") for row in rows)
    first = (
        "It is not known which of these images are poisoned, so attack success cannot be measured."
        if untrusted
        else "These images carry no attack, so there is no attack success to measure."
    )
    shares = [
        f"{percent(_mean(row, 'clean_acc'))} {f'with {row.title}' if row.defends else 'without defence'}"
        + (f" ({printable(row.variant, 120)})" if row.variant else "")
        for row in rows[:6]
    ]
    more = f" and {len(rows) - 6} more settings" if len(rows) > 6 else ""
    return f"{first} Accuracy on the test images is {wording.joined(shares)}{more}."
