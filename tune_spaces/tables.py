"""The tables of a sweep: trials, stages, proxies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.dataset.manifest import open_dataset
from dbd_dist.reporting.wording import duration, number
from dbd_dist.runtime.keys import stage_keys
from tune_spaces.book import Book, Row
from tune_spaces.metrics import proxies
from tune_spaces.plan import Plan

SHOWN = 20
"""Trials in the table on the terminal."""


def shown_metrics(plan: Plan) -> list[str]:
    """The metrics of a line: those that are optimised, and what says most beside them."""
    also = ("asr", "asr_none", "clean_acc", "psnr_db") if plan.attacks else ("clean_acc", "asr", "kept_poisoned")
    return list(dict.fromkeys([*(metric.name for metric in plan.metrics), *also]))


def cell(value: Any) -> str:
    """A value in a few characters."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.4g}"


def trials(plan: Plan, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of trials."""
    metrics = shown_metrics(plan)
    lines = [
        [str(row["number"]), *(cell(row["values"].get(field)) for field in plan.vary)]
        + [_with_spread(row, name) for name in metrics]
        + [_state(row)]
        for row in rows
    ]
    return ["trial", *plan.vary, *metrics, ""], lines


def _with_spread(row: Row, name: str) -> str:
    spread = row.get("spread", {}).get(name)
    return cell(row["metrics"].get(name)) + ("" if spread is None else f" ± {cell(spread)}")


def _state(row: Row) -> str:
    if row["status"] == "stopped":
        return f"stopped early, epoch {row['epoch']}"
    if "too_visible_by" in row["metrics"]:
        return "too visible"
    return "" if row["status"] == "finished" else row["status"]


def stages(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the time table: how often each stage was trained and reused, seconds that it took and that
    reuse has spared."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for stage, one in row.get("stages", {}).items():
            trained, reused, took, spared = found.get(stage, [0, 0, 0.0, 0.0])
            if one["reused"]:
                found[stage] = [trained, reused + 1, took, spared + one["seconds"]]
            else:
                found[stage] = [trained + 1, reused, took + one["seconds"], spared]
    head = ["stage", "trained", "reused", "time", "spared by reuse"]
    lines = [[stage, str(t), str(r), duration(took), duration(spared)] for stage, (t, r, took, spared) in found.items()]
    waited = sum(row.get("waited_s", 0.0) for row in rows)
    return head, [*lines, ["waiting for others' stages", "", "", duration(waited), ""]] if lines else []


def proxy_lines(rows: Sequence[Row]) -> list[str]:
    """How well each metric of the defender ranks the trials."""
    return [
        f"{name}: rank correlation with the score {'-' if found is None else f'{found:+.2f}'} over {count} trials"
        for name, (count, found) in proxies(rows).items()
    ]


def shared(plan: Plan) -> dict[str, int]:
    """How often each stage has to be trained for all points of a grid; empty where that is not known beforehand, or
    every trial has data of its own."""
    if plan.search != "grid" or plan.attacks:
        return {}
    found: dict[str, set[str]] = {}
    for seed, data in plan.datas.items():
        dataset = open_dataset(data)
        for point in plan.points:
            for stage, key in stage_keys(plan.config(point, seed), dataset, bf16=False).items():
                found.setdefault(stage, set()).add(key)
    return {stage: len(keys) for stage, keys in found.items()}


def as_text(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns for a terminal: the first to the left, others to the right."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        first, *others = cells
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:]))]).rstrip()

    return "\n".join(row(line) for line in [head, *lines])


def summary(plan: Plan, book: Book) -> str:
    """Everything that is printed at the end."""
    rows = book.ranked()
    parts = [as_text(*trials(plan, rows[:SHOWN]))]
    if len(rows) > SHOWN:
        parts[0] += f"\n... and {number(len(rows) - SHOWN)} more in {plan.folder / 'trials.parquet'}"
    if len(plan.metrics) > 1:
        parts.append(f"Pareto front: trials {', '.join(str(row['number']) for row in book.front())}")
    head, lines = stages(rows)
    if lines:
        parts.append(as_text(head, lines))
    parts += ["\n".join(proxy_lines(rows))] if proxy_lines(rows) else []
    if not plan.truth:
        parts.append("chosen without the truth; clean_acc, asr and kept_poisoned are for the reader")
    return "\n\n".join(parts)


def flat(row: Row) -> Mapping[str, Any]:
    """A row with plain values only, for trials.parquet."""
    reused = [stage for stage, one in row.get("stages", {}).items() if one["reused"]]
    return {
        "number": row["number"],
        "status": row["status"],
        **{f"config/{field}": value for field, value in row["values"].items()},
        **{f"metric/{name}": value for name, value in row["metrics"].items()},
        **{f"std/{name}": value for name, value in row.get("spread", {}).items()},
        **{f"seconds/{stage}": one["seconds"] for stage, one in row.get("stages", {}).items()},
        "seconds": row.get("seconds"),
        "waited_s": row.get("waited_s"),
        "epoch": row.get("epoch"),
        "reused_stages": reused,
        "runs": row.get("runs", []),
        "message": row.get("message"),
    }
