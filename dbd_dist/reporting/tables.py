"""Results over seeds: mean and standard deviation, as text for a terminal and as Markdown.

A row holds runs that differ in their seeds alone. Another data set, attack, preset, method, training-set size or
setting makes another row, so that nothing is averaged that does not belong together.
"""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbd_dist.reporting import names, wording
from dbd_dist.reporting.judged import judged
from dbd_dist.reporting.wording import printable

NOTE_WIDTH = 100
"""Columns of a sentence below a table on a terminal."""


@dataclass(frozen=True)
class Stat:
    """One measure over the runs of a row."""

    mean: float
    std: float | None
    """Sample standard deviation (over n - 1); None for a single run."""
    n: int


def statistics(values: Iterable[float | None]) -> Stat | None:
    """Over the values that exist; None where there are none."""
    present = [float(v) for v in values if v is not None]
    if not present:
        return None
    mean = math.fsum(present) / len(present)
    if len(present) == 1:
        return Stat(mean, None, 1)
    squares = math.fsum((v - mean) ** 2 for v in present)
    return Stat(mean, math.sqrt(squares / (len(present) - 1)), len(present))


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone. Fractions in 0-1."""

    dataset: str
    """Without the seed of the poisoning, which is part of a data set's name."""
    attack: str
    preset: str
    train_size: int | None
    method: str
    variant: str
    """The settings in which this row differs from others of its data set and method; empty where there is one row."""
    results: tuple[Mapping[str, Any], ...]
    """result.json of each run."""
    members: tuple[int, ...]
    """Their positions among the results that the table was made of."""

    @property
    def group(self) -> tuple[str, str, str, int | None]:
        """Rows of one group can be compared: same data, attack, preset."""
        return (self.dataset, self.attack, self.preset, self.train_size)

    @property
    def title(self) -> str:
        """The method's; not escaped."""
        return printable(names.title(self.method, self.results[0]), 40)

    @property
    def defends(self) -> bool:
        """False: the baseline that defences are compared with."""
        return names.defends(self.method, self.results[0])

    @property
    def needs_clean(self) -> bool:
        """It had clean images of the defender's own."""
        return names.needs_clean(self.results[0])

    @property
    def seeds(self) -> list[int]:
        return self.values("seed")

    def values(self, field: str) -> list[Any]:
        """A field of every run that has it."""
        return [result[field] for result in self.results if result.get(field) is not None]

    def stat(self, field: str) -> Stat | None:
        """Over the runs that have the field; "seconds" are those of all stages together."""
        values = self.values(field)
        return statistics([math.fsum(v.values()) for v in values if v] if field == "seconds" else values)

    @property
    def devices(self) -> list[str]:
        return sorted({_device(result) for result in self.results if result.get("device")})

    @property
    def remarks(self) -> list[str]:
        """What a reader has to know of how the runs differ; not escaped."""
        remarks = []
        runs = [(r.get("seed"), r.get("data_hash") or r.get("dataset")) for r in self.results]
        if repeated := {seed for seed, data in runs if isinstance(seed, int) and runs.count((seed, data)) > 1}:
            remarks.append(f"{wording.seeds(repeated)} counted more than once: the spread is too small")
        if len(self.devices) > 1:
            remarks.append(f"times come from different machines: {'; '.join(self.devices)}")
        if len({str(result.get("precision")) for result in self.results}) > 1:
            remarks.append("runs of different floating-point precision")
        return remarks


def _device(result: Mapping[str, Any]) -> str:
    size = result.get("world_size") or 1
    return printable(result["device"]) + (f", {size} workers" if size != 1 else "")


def family(result: Mapping[str, Any]) -> str:
    """A data set's name without the seed of its poisoning: runs over seeds poison anew."""
    name = str(result.get("dataset") or "unknown data")
    return name if result.get("attack") in (None, "clean") else re.sub(r"-s\d+$", "", name)


def aggregate(results: Sequence[Mapping[str, Any]], variants: Sequence[str] | None = None) -> list[Row]:
    """Rows over seeds, those that can be compared side by side: the baseline first, then defences by name.

    Args:
        results: the contents of result.json files.
        variants: for every result the settings that set it apart from others of its name (`settings.differing`).
    """
    members: dict[Any, list[int]] = {}
    for i, result in enumerate(results):
        attack, preset = str(result.get("attack") or "clean"), str(result.get("preset") or "custom")
        key = (family(result), attack, preset, result.get("train_size"), str(result["method"]))
        members.setdefault((*key, variants[i] if variants else ""), []).append(i)
    rows = [Row(*key, results=tuple(results[i] for i in at), members=tuple(at)) for key, at in members.items()]
    places = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    return sorted(rows, key=lambda row: (places[row.group], row.defends, row.method, row.variant))


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can be compared with each other, a list a group."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.values())


# -- cells


def _spread(row: Row, field: str, show: Callable[[float], str]) -> str:
    """Mean and standard deviation; a dash where no run has the field."""
    stat = row.stat(field)
    if stat is None:
        return "–"
    fewer = "" if stat.n == len(row.results) else f" (n = {stat.n})"
    return show(stat.mean) + ("" if stat.std is None else f" ± {show(stat.std)}") + fewer


def _share(field: str) -> Callable[[Row], str]:
    return lambda row: _spread(row, field, lambda fraction: f"{100 * fraction:.2f}")


def _kept(row: Row) -> str:
    kept, of = row.stat("kept_poisoned"), row.stat("poisoned")
    if kept is None or of is None:
        return "–"
    fewer = "" if kept.n == len(row.results) else f" (n = {kept.n})"
    spread = "" if kept.std is None else f" ± {wording.number(kept.std)}"
    return f"{wording.number(kept.mean)}{spread} of {wording.number(of.mean)}{fewer}"


CLEAN = "†"
"""Marks methods that had clean images: their threat model is another one."""


def _method(row: Row) -> str:
    name = f"{row.title} {CLEAN}" if row.needs_clean else row.title
    return f"{name} ({printable(row.variant, 160)})" if row.variant else name


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": _method,
    "n": lambda row: str(len(row.results)),
    "clean acc. %": _share("clean_acc"),
    "ASR %": _share("asr"),
    "robust acc. %": _share("robust_acc"),
    "poisoned kept": _kept,
    "time": lambda row: _spread(row, "seconds", wording.duration),
}
"""Titles and cells of every format."""


def group_title(row: Row) -> str:
    """What the rows of a group have in common, in one line; not escaped."""
    parts = [printable(row.dataset), f"preset {printable(row.preset, 40)}"]
    if row.train_size is not None:
        parts.append(f"{row.train_size:,} training images")
    return " · ".join(parts)


def row_name(row: Row, among: Sequence[Row]) -> str:
    """A row's method and what sets it apart from the others; not escaped."""
    name = _method(row)
    return name if len(grouped(among)) == 1 else f"{group_title(row)} · {name}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Sentences that belong below a table; not escaped."""
    over = sorted({wording.seeds(row.seeds) for row in rows if len(row.results) > 1})
    spread = [f"Mean ± sample standard deviation over runs ({'; '.join(over)})."] if over else []
    if any(row.needs_clean for row in rows):
        spread.append(f"{CLEAN} needs clean images of the defender's own, which the others do without.")
    found = [f"{_method(row)} flagged {text}." for row in rows for text in [flagged(row)] if text]
    found += [f"{_method(row)}: {text}." for row in rows for text in [judged(row.results)] if text]
    return spread + found + [f"{_method(row)}: {remark}" for row in rows for remark in row.remarks]


def flagged(row: Row) -> str:
    """What a detector flagged, mean over the runs, with its hits and false alarms where the truth is known; empty where
    there is no detector. Not escaped."""
    found = row.values("flagged")
    parts = []
    if (count := statistics(one.get("samples") for one in found)) is not None:
        parts.append(f"{wording.number(count.mean)} training images{_rates(found, 'tpr', 'fpr', 'poisoned', 'clean')}")
    lists = [one["classes"] for one in found if one.get("classes") is not None]
    if lists:
        named = wording.joined(dict.fromkeys(map(_classes, lists)))
        parts.append(f"{named}{_rates(found, 'class_tpr', 'class_fpr', 'target', 'other')}")
    return wording.joined(parts)


def _classes(labels: Sequence[int]) -> str:
    """ "class 3", "classes 1 and 3"."""
    return f"class{'' if len(labels) == 1 else 'es'} {wording.joined(map(str, labels))}" if labels else "no class"


def _rates(found: Sequence[Mapping[str, Any]], hits: str, alarms: str, those: str, others: str) -> str:
    """ " (97.2 % of the poisoned, 1.0 % of the clean)"."""
    stats = [(statistics(one.get(name) for one in found), what) for name, what in ((hits, those), (alarms, others))]
    shown = [f"{wording.percent(stat.mean)} of the {what} ones" for stat, what in stats if stat is not None]
    return f" ({', '.join(shown)})" if shown else ""


def hardware(rows: Sequence[Row]) -> list[str]:
    """A sentence on the machines, where they are known; not escaped."""
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    return [f"Hardware: {'; '.join(devices)}."] if devices else []


# -- formats


def as_text(rows: Sequence[Row]) -> str:
    """Aligned columns for a terminal, a block a group."""
    blocks = []
    for group in grouped(rows):
        lines = [list(COLUMNS), *([cell(row) for cell in COLUMNS.values()] for row in group)]
        widths = [max(_width(line[i]) for line in lines) for i in range(len(COLUMNS))]
        table = []
        for line in lines:
            cells = [
                text + " " * (w - _width(text)) if i == 0 else " " * (w - _width(text)) + text
                for i, (text, w) in enumerate(zip(line, widths, strict=True))
            ]
            table.append("  ".join(cells).rstrip())
        table.insert(1, "  ".join("─" * w for w in widths))
        together = (note.replace(" %", "\u00a0%") for note in notes(group))
        below = [textwrap.fill(note, NOTE_WIDTH, subsequent_indent="  ").replace("\u00a0", " ") for note in together]
        blocks.append("\n".join([group_title(group[0]), "", *table, *below]))
    return "\n\n".join(blocks)


def _width(text: str) -> int:
    """Columns on a terminal: East Asian characters take two, combining ones none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def as_markdown(rows: Sequence[Row]) -> str:
    """One table, with the data set in the first column; notes and hardware below."""
    if not rows:
        return ""
    head = ["data set", "preset", *COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(COLUMNS) - 1)]
    for row in rows:
        cells = [printable(row.dataset), printable(row.preset, 40), *(cell(row) for cell in COLUMNS.values())]
        lines.append("| " + " | ".join(_markdown(cell) for cell in cells) + " |")
    return "\n".join(lines + [line for note in notes(rows) + hardware(rows) for line in ("", _markdown(note))])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text).replace("&", "&amp;")


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """Results of runs that have just ended, for the terminal."""
    return as_text(aggregate(results))
