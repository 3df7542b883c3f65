"""Results over seeds: mean and standard deviation, as text for a terminal and as Markdown.

A row holds runs that differ in their seeds alone. Another data set, attack, preset, method, training-set size or
setting makes another row, so that nothing is averaged that does not belong together.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dbd_dist.reporting import names, wording
from dbd_dist.reporting.wording import printable


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seeds alone. Fractions in 0-1."""

    dataset: str
    """Without the seed of the poisoning, which is part of a data set's name."""
    attack: str
    preset: str
    method: str
    defends: bool
    """False: the baseline that defences are compared with."""
    variant: str
    """The settings in which this row differs from others of its data set and method; empty where there is one row."""
    train_size: int | None
    n: int
    seeds: tuple[int, ...]
    clean_acc: Stat | None
    asr: Stat | None
    robust_acc: Stat | None
    kept_poisoned: Stat | None
    poisoned: Stat | None
    seconds: Stat | None
    """All stages together."""
    devices: tuple[str, ...]
    notes: tuple[str, ...]
    members: tuple[int, ...]
    """Positions among the results that the row was made of."""

    @property
    def group(self) -> tuple[str, str, str, int | None]:
        """Rows of one group can be compared: same data, attack, preset."""
        return (self.dataset, self.attack, self.preset, self.train_size)


def family(result: Mapping[str, Any]) -> str:
    """A data set's name without the seed of its poisoning: runs over seeds poison anew."""
    name = str(result.get("dataset") or "unknown data")
    return name if result.get("attack") in (None, "clean") else re.sub(r"-s\d+$", "", name)


def aggregate(results: Sequence[Mapping[str, Any]], variants: Sequence[str] | None = None) -> list[Row]:
    """Rows over seeds, those that can be compared side by side.

    Args:
        results: the contents of result.json files.
        variants: for every result the settings that set it apart from others of its name (`settings.differing`).
    """
    members: dict[tuple[Any, ...], list[int]] = {}
    for i, result in enumerate(results):
        variant = variants[i] if variants else ""
        key = (
            family(result),
            str(result.get("attack") or "clean"),
            str(result.get("preset") or "custom"),
            result.get("train_size"),
            str(result["method"]),
            variant,
        )
        members.setdefault(key, []).append(i)
    rows = [_row(key, [results[i] for i in at], tuple(at)) for key, at in members.items()]
    places = {group: i for i, group in enumerate(dict.fromkeys(row.group for row in rows))}
    return sorted(
        rows,
        key=lambda row: (places[row.group], row.defends, names.place(row.method), row.method, row.variant),
    )


def _row(key: tuple[Any, ...], results: list[Mapping[str, Any]], at: tuple[int, ...]) -> Row:
    dataset, attack, preset, train_size, method, variant = key
    totals = [math.fsum(r["seconds"].values()) if r.get("seconds") else None for r in results]
    devices = tuple(sorted({_device(r) for r in results if r.get("device")}))
    remarks = []
    identities = [(r.get("seed"), r.get("data_hash") or r.get("dataset")) for r in results]
    repeated = {seed for seed, data in identities if isinstance(seed, int) and identities.count((seed, data)) > 1}
    if repeated:
        remarks.append(f"{wording.seeds(repeated)} counted more than once: the spread is too small")
    if len(devices) > 1:
        remarks.append(f"times come from different machines: {'; '.join(devices)}")
    if len({str(r.get("precision")) for r in results}) > 1:
        remarks.append("runs of different floating-point precision")
    return Row(
        dataset=dataset,
        attack=attack,
        preset=preset,
        method=method,
        defends=names.defends(method, results[0].get("defends")),
        variant=variant,
        train_size=train_size,
        n=len(results),
        seeds=tuple(r["seed"] for r in results if isinstance(r.get("seed"), int)),
        clean_acc=statistics(r.get("clean_acc") for r in results),
        asr=statistics(r.get("asr") for r in results),
        robust_acc=statistics(r.get("robust_acc") for r in results),
        kept_poisoned=statistics(r.get("kept_poisoned") for r in results),
        poisoned=statistics(r.get("poisoned") for r in results),
        seconds=statistics(totals),
        devices=devices,
        notes=tuple(remarks),
        members=at,
    )


def _device(result: Mapping[str, Any]) -> str:
    size = result.get("world_size") or 1
    return f"{printable(result['device'])}" + (f", {size} workers" if size != 1 else "")


# -- cells


def _share(stat: Stat | None, row: Row) -> str:
    if stat is None:
        return "–"
    return f"{100 * stat.mean:.2f}" + ("" if stat.std is None else f" ± {100 * stat.std:.2f}") + _fewer(stat, row)


def _fewer(stat: Stat, row: Row) -> str:
    return "" if stat.n == row.n else f" (n = {stat.n})"


def _kept(row: Row) -> str:
    if row.kept_poisoned is None or row.poisoned is None:
        return "–"
    kept = row.kept_poisoned
    spread = "" if kept.std is None else f" ± {wording.number(kept.std)}"
    return f"{wording.number(kept.mean)}{spread} of {wording.number(row.poisoned.mean)}{_fewer(kept, row)}"


def _time(row: Row) -> str:
    if row.seconds is None:
        return "–"
    spread = "" if row.seconds.std is None else f" ± {wording.duration(row.seconds.std)}"
    return wording.duration(row.seconds.mean) + spread + _fewer(row.seconds, row)


def _method(row: Row) -> str:
    name = printable(names.method_name(row.method), 40)
    return f"{name} ({printable(row.variant, 160)})" if row.variant else name


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": _method,
    "n": lambda row: str(row.n),
    "clean acc. %": lambda row: _share(row.clean_acc, row),
    "ASR %": lambda row: _share(row.asr, row),
    "robust acc. %": lambda row: _share(row.robust_acc, row),
    "poisoned kept": _kept,
    "time": _time,
}
"""Titles and cells of every format."""


def title(row: Row) -> str:
    """What the rows of a group have in common, in one line; not escaped."""
    parts = [printable(row.dataset), f"preset {printable(row.preset, 40)}"]
    if row.train_size is not None:
        parts.append(f"{row.train_size:,} training images")
    return " · ".join(parts)


def row_name(row: Row, among: Sequence[Row]) -> str:
    """A row's method and what sets it apart from the others; not escaped."""
    name = _method(row)
    return name if len(grouped(among)) == 1 else f"{title(row)} · {name}"


def notes(rows: Sequence[Row]) -> list[str]:
    """Sentences that belong below a table; not escaped."""
    over = sorted({wording.seeds(row.seeds) for row in rows if row.n > 1})
    spread = [f"Mean ± sample standard deviation over runs ({'; '.join(over)})."] if over else []
    return spread + [f"{_method(row)}: {note}" for row in rows for note in row.notes]


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can be compared with each other, a list a group."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return list(groups.values())


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
        blocks.append("\n".join([title(group[0]), "", *table, *notes(group)]))
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
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    below = notes(rows)
    if devices:
        below.append(f"Hardware: {'; '.join(devices)}.")
    return "\n".join(lines + [line for note in below for line in ("", _markdown(note))])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", text).replace("&", "&amp;")


def format_results(results: Sequence[Mapping[str, Any]]) -> str:
    """Results of runs that have just ended, for the terminal."""
    return as_text(aggregate(results))
