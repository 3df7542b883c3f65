"""What a sweep leaves beside sweep.json: trials.parquet, sweep.html, and TensorBoard's HParams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from dbd_dist.reporting.page import environment, write_file
from tune_spaces import figures, tables
from tune_spaces.book import Book, Row
from tune_spaces.plan import Plan
from tune_spaces.search import to_optuna
from tune_spaces.space import Choice

TABLE_FILE, PAGE_FILE, HPARAMS = "trials.parquet", "sweep.html", "tensorboard"
FEWEST = 5
"""Trials that an estimate of importance needs."""


def write(plan: Plan, book: Book, retrain: str | None) -> None:
    """Write all of it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_table(book, plan.folder / TABLE_FILE)
        write_hparams(book, plan.folder / HPARAMS)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=plan.folder) from error
    write_file(plan.folder / PAGE_FILE, render(plan, book, retrain))


def write_table(book: Book, path: Path) -> None:
    """A line a trial, by number; values of a field that are not all numbers or all texts, as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [dict(tables.flat(row)) for _, row in sorted(book.rows.items())]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns: dict[str, Any] = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    aside = path.with_name(f".{path.name}.partial")
    pq.write_table(pa.table(columns), aside)
    aside.replace(path)


def write_hparams(book: Book, folder: Path) -> None:
    """Event files for TensorBoard's HParams: a run a trial, its values and its metrics."""
    from torch.utils.tensorboard.summary import hparams
    from torch.utils.tensorboard.writer import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for number, row in sorted(book.rows.items()):
        if row["status"] not in ("finished", "stopped"):
            continue
        values = {k: v if isinstance(v, int | float | str | bool) else json.dumps(v) for k, v in row["values"].items()}
        metrics = {f"metric/{name}": value for name, value in row["metrics"].items() if value is not None}
        with SummaryWriter(str(folder / f"trial-{number:04d}")) as writer:
            for summary in hparams(values, metrics):
                assert writer.file_writer is not None
                writer.file_writer.add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, 0)


def render(plan: Plan, book: Book, retrain: str | None) -> str:
    """The page."""
    rows = book.ranked()
    best = book.best()
    head, lines = tables.trials(plan, rows)
    time_head, time_lines = tables.stages(rows)
    return environment().get_template("sweep.html").render(
        title=f"DBD-Dist: {plan.name}",
        sentences=_sentences(plan, book, best),
        trials=(head, lines),
        times=(time_head, time_lines),
        proxies=tables.proxy_lines(rows),
        truth=plan.truth,
        figures=drawings(plan, book),
        against=None if best is None else best.get("against"),
        retrain=retrain,
        sweep={name: json.dumps(value) for name, value in book.identity.items()},
    )  # fmt: skip


def _sentences(plan: Plan, book: Book, best: Row | None) -> list[str]:
    counts = {
        status: sum(row["status"] == status for row in book.rows.values())
        for status in ("finished", "stopped", "failed")
    }
    said = f"{plan.search} search over {', '.join(plan.vary)}: {counts['finished']} of {plan.trials} trials finished"
    said += f", {counts['stopped']} stopped early" if counts["stopped"] else ""
    said += f", {counts['failed']} failed" if counts["failed"] else ""
    if best is None:
        return [f"{said}."]
    values = ", ".join(f"{field} {tables.cell(value)}" for field, value in best["values"].items())
    metrics = ", ".join(f"{name} {tables.cell(best['metrics'].get(name))}" for name in tables.shown_metrics(plan))
    return [f"{said}.", f"Best: trial {best['number']} ({values}): {metrics}."]


def drawings(plan: Plan, book: Book) -> list[dict[str, Any]]:
    """The figures that these trials allow."""
    rows = [row for row in book.ranked() if row["status"] == "finished" and book.signed(row) is not None]
    found: list[dict[str, Any]] = []
    if len(rows) > 1 and "split.keep" in plan.vary:
        points = [(row["values"]["split.keep"], _shares(row)) for row in rows]
        drawing = figures.sensitivity("sensitivity", "Metrics over the filtering ratio", "split.keep", points)
        caption = (
            "blue: clean accuracy; orange, dashed: attack success; black: share of the poisoned images that were kept"
        )
        found.append({"title": "Sensitivity to the filtering ratio", "drawing": drawing, "caption": caption})
    visible = [row for row in rows if "too_visible_by" not in row["metrics"]]
    if len(visible) > 1:
        signed = [(book.signed(row) or [0.0])[0] for row in visible]
        metric = plan.metrics[0].name
        drawing = figures.parallel(
            "parallel",
            f"Values of each trial, coloured by {metric}",
            plan.vary,
            [r["values"] for r in visible],
            signed,
            metric,
        )
        found.append({"title": "Parallel coordinates", "drawing": drawing, "caption": f"darker: better {metric}"})
        known = importance(plan, visible, signed)
        if known:
            drawing = figures.bars("importance", "Importance of each field", known)
            caption = f"share of the variation of {metric} that each field explains (fANOVA)"
            found.append({"title": "Importance", "drawing": drawing, "caption": caption})
    pair = [metric.name for metric in plan.metrics] if len(plan.metrics) > 1 else ["clean_acc", "asr"]
    both = [row for row in visible if all(row["metrics"].get(name) is not None for name in pair[:2])]
    if len(both) > 1:
        points = [(row["metrics"][pair[0]], row["metrics"][pair[1]]) for row in both]
        ups = [_up(plan, name) for name in pair[:2]]
        from tune_spaces.metrics import front

        best = front([[v if up else -v for v, up in zip(point, ups)] for point in points])
        drawing = figures.scatter("pareto", f"{pair[1]} over {pair[0]}", points, best, pair[:2])
        found.append({"title": "Pareto front", "drawing": drawing, "caption": "joined: no trial is better in both"})
    return [{"by": None, **figure} for figure in found]


def _up(plan: Plan, name: str) -> bool:
    from tune_spaces.metrics import ATTACK, DEFENDER, TRUTH

    return (ATTACK if plan.attacks else TRUTH | DEFENDER)[name]


def _shares(row: Row) -> dict[str, float | None]:
    metrics = row["metrics"]
    kept = metrics["kept_poisoned"] / metrics["poisoned"] if metrics.get("poisoned") else None
    return {name: metrics.get(name) for name in ("clean_acc", "asr")} | {"kept": kept}


def importance(plan: Plan, rows: Sequence[Row], signed: Sequence[float]) -> dict[str, float]:
    """How much of the first metric's variation each field explains, by fANOVA (Hutter et al. 2014); empty where that
    cannot be said."""
    if len(rows) < FEWEST or len(plan.vary) < 2 or len(set(signed)) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    distributions = {field: to_optuna(given) for field, given in plan.vary.items()}
    for row, value in zip(rows, signed):
        params = {
            field: given.values.index(row["values"][field]) if isinstance(given, Choice) else row["values"][field]
            for field, given in plan.vary.items()
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
