"""One self-contained HTML page from run folders: no script, nothing loaded from elsewhere, light and dark.

Whatever comes from a data set or a run (names of classes, files, runs) passes through `wording.escaped`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from dbd_dist.reporting import embedding, figures, gallery, settings, tables, wording
from dbd_dist.reporting.conclusions import verdicts
from dbd_dist.reporting.runs import Data, Run, find_data, load_run, results_of
from dbd_dist.reporting.style import CSS
from dbd_dist.reporting.tables import FIRST, Row
from dbd_dist.reporting.wording import escaped, percent, printable

SHOWN_ROWS = 6
"""Rows of the table that get histograms and suspects of their own; a sweep has hundreds."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A run that is shown in detail: the first of its row."""

    run: Run
    row: Row | None
    """None while there is no result."""
    name: str
    """For headings; not escaped."""
    data: Data | str
    """The data set, or why it cannot be had."""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page on some runs.

    Args:
        folders: run folders; those of unfinished runs are shown as far as they got.
        out: the file to write.

    Returns:
        `out`.

    Raises:
        UserError: no folder is given, one is no run folder, a file in it is damaged, or `out` cannot be written.
    """
    if not folders:
        raise UserError("no run folder is named", where="report", hint="name the folders of one or more runs")
    write_file(out, render(folders))
    return out


def write_file(path: Path, text: str) -> None:
    """Write text aside and rename, so that there is the old file or the whole new one.

    Raises:
        UserError: it cannot be written there.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError("is a folder", where=path, hint="name a file")
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=path, hint="choose another file") from error
    finally:
        with suppress(OSError):  # renamed, or never there
            aside.unlink()


def render(folders: Sequence[Path]) -> str:
    """The page as text."""
    runs = [load_run(folder, arrays=False) for folder in folders]
    results, variants = results_of(runs)
    rows = tables.aggregate(results, variants)
    shown = _choose(runs, rows)
    sections = [
        ("Result", _result(runs, rows)),
        ("Training", _training(runs, rows)),
        ("What the filter saw", _filter(shown)),
        ("How the network sees the images", _features(shown)),
        ("Most suspect images", _suspects(shown)),
        ("Accuracy by class", _classes(rows, results, shown)),
        ("Settings and versions", _settings(runs)),
    ]
    names = list(dict.fromkeys(tables.family(r) for r in results)) or list(dict.fromkeys(r.dataset for r in runs))
    title = f"DBD-Dist: {', '.join(printable(name) for name in names[:3])}{' …' if len(names) > 3 else ''}"
    said = verdicts(rows, results) or [_unfinished(runs)]
    # a number and its "%" stay on one line
    said = [escaped(text, 1000).replace(" %", "&nbsp;%") for text in said[:SHOWN_ROWS]]
    lead = "".join(f'<p class="verdict">{text}</p>' for text in said)
    body = "".join(f"<section><h2>{escaped(heading)}</h2>{text}</section>\n" for heading, text in sections if text)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title, 300)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escaped(title, 300)}</h1>\n{lead}\n{body}</main>\n</body>\n</html>\n"
    )


def _unfinished(runs: Sequence[Run]) -> str:
    states = wording.joined(f"{printable(run.folder.name, 40)}: {run.state}" for run in runs[:4])
    return f"There is no result yet ({states}{' …' if len(runs) > 4 else ''})."


# -- which runs are shown


def _name(run: Run, row: Row | None) -> str:
    variant = f" ({row.variant})" if row is not None and row.variant else ""
    seed = "" if run.seed is None else f", seed {run.seed}"
    return f"{wording.method_name(run.method)}{variant}{seed}"


def _finished(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.result is not None]


def _choose(runs: Sequence[Run], rows: Sequence[Row]) -> list[_Shown]:
    finished = _finished(runs)
    chosen: list[tuple[Run, Row | None]] = []
    for row in rows[:SHOWN_ROWS]:
        members = [finished[i] for i in row.members]
        chosen.append((min(members, key=lambda run: (run.seed is None, run.seed or 0)), row))
    going = [run for run in runs if run.result is None]
    chosen += [(run, None) for run in going[: max(SHOWN_ROWS - len(chosen), 0)]]
    groups = {row.group for row in rows}
    shown = []
    for run, row in chosen:
        loaded = load_run(run.folder)
        name = _name(loaded, row)
        if row is None:
            name += f" ({loaded.state})"
        elif len(groups) > 1:
            name = f"{tables.title(row)} · {name}"
        shown.append(_Shown(run=loaded, row=row, name=name, data=find_data(loaded)))
    return shown


def _heading(one: _Shown, among: Sequence[_Shown]) -> str:
    return f"<h3><bdi>{escaped(one.name, 200)}</bdi></h3>" if len(among) > 1 else ""


def _of_seeds(among: Sequence[_Shown]) -> str:
    """That one seed stands for several."""
    many = [one for one in among if one.row is not None and one.row.n > 1]
    if not many:
        return ""
    parts = {
        f"{wording.method_name(one.run.method)}: seed {one.run.seed} of {one.row.n} runs" for one in many if one.row
    }
    return f'<p class="note">One run stands for its row ({escaped("; ".join(sorted(parts)), 300)}).</p>'


# -- result


def _result(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>No run has finished, so there are no results yet.</p>"
    going = [run for run in runs if run.result is None]
    notes = [f"{printable(run.folder.name, 60)} is not in the table: {run.state}." for run in going]
    devices = list(dict.fromkeys(device for row in rows for device in row.devices))
    if devices:
        notes.append(f"Hardware: {'; '.join(devices)}.")
    notes.append(
        "ASR: attack success rate, the share of triggered test images of other classes that are called the target. "
        "Robust accuracy: the share of them that are called what they are."
    )
    if len(rows) > SHOWN_ROWS:
        notes.append(f"The sections below show the first {SHOWN_ROWS} rows.")
    return tables.as_html(rows) + "".join(f'<p class="note">{escaped(note, 600)}</p>' for note in notes)


# -- training curves


def _points(rows: Sequence[Mapping[str, Any]], field: str, factor: float = 1.0) -> tuple[list[float], list[float]]:
    """Epochs and values where there is a finite number."""
    pairs = [
        (row["epoch"], factor * row[field])
        for row in rows
        if isinstance(row.get(field), int | float) and np.isfinite(row[field])
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _stage_rows(run: Run, stage: str) -> list[Mapping[str, Any]]:
    return [row for row in run.metrics if row["stage"] == stage]


def _training(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    losses, measured = _loss_curves(runs), _measured_curves(runs, rows)
    text = f'<h3>Loss by stage</h3><div class="grid">{losses}</div>' if losses else ""
    if measured:
        attacked = any(row.get("asr") is not None or row.get("kept_poisoned") for run in runs for row in run.metrics)
        other = "attack success (ASR), and poisoned images kept" if attacked else None
        legend = figures.line_legend("clean accuracy", other)
        text += (
            f'<h3>Accuracy, attack success and the filter over epochs</h3>{legend}<div class="grid">{measured}</div>'
        )
    elif text:
        text += "<p>Accuracy and attack success were not measured between epochs.</p>"
    if not text:
        return "<p>No epoch has been reported yet.</p>"
    many = " One line a run." if len(runs) > len({run.method for run in runs}) else ""
    return f"{text}<p class='note'>Epochs count from 1 within their stage.{many}</p>"


def _loss_curves(runs: Sequence[Run]) -> str:
    found = {row["stage"] for run in runs for row in run.metrics}
    known = [stage for stage in wording.STAGES if stage in found]
    parts = []
    for number, stage in enumerate([*known, *sorted(found - set(known))][:8]):
        series, ends = [], []
        for run in runs:
            x, y = _points(_stage_rows(run, stage), "loss")
            if x:
                series.append(figures.Line(x=x, y=y))
                ends.append((y[0], y[-1]))
        if not series:
            continue
        name = wording.stage_name(printable(stage, 40))
        first, last = (float(np.mean([end[i] for end in ends])) for i in (0, 1))
        alt = f"{name}: the loss goes from {first:.3g} to {last:.3g} over {max(len(s.x) for s in series)} epochs"
        drawing = figures.curves(f"loss{number}", alt, series, x_title="epoch", y_title="loss")
        parts.append(f"<figure><strong>{escaped(name)}</strong>{drawing}</figure>")
    return "".join(parts)


def _measured_curves(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Clean accuracy and attack success over epochs for every row, and what the filter kept."""
    finished = _finished(runs)
    groups = [(_row_name(row, rows), [finished[i] for i in row.members]) for row in rows[:SHOWN_ROWS]]
    groups += [(_name(run, None), [run]) for run in runs if run.result is None][: max(SHOWN_ROWS - len(groups), 0)]
    parts = []
    for number, (name, members) in enumerate(groups):
        accuracy, success, kept = [], [], []
        for run in members:
            last = [row for row in run.metrics if row["stage"] in ("mixmatch", "supervised")]
            for field, look, into in (("clean_acc", "clean", accuracy), ("asr", "poisoned", success)):
                x, y = _points(last, field, 100)
                if x:
                    into.append(figures.Line(x=x, y=y, look=look))
            counted = [
                {"epoch": row["epoch"], "share": row["kept_poisoned"] / row["poisoned"]}
                for row in _stage_rows(run, "mixmatch")
                if isinstance(row.get("kept_poisoned"), int)
                and isinstance(row.get("poisoned"), int)
                and row["poisoned"]
            ]
            x, y = _points(counted, "share", 100)
            if x:
                kept.append(figures.Line(x=x, y=y, look="poisoned"))
        if accuracy or success:
            says = [
                f"{what} ends at {percent(float(np.mean([line.y[-1] for line in lines])) / 100)}"
                for what, lines in (("clean accuracy", accuracy), ("attack success", success))
                if lines
            ]
            alt = f"{name}: {' and '.join(says)}"
            drawing = figures.curves(
                f"acc{number}", alt, [*accuracy, *success], x_title="epoch", y_title="%", percent=True
            )
            parts.append(f"<figure><strong><bdi>{escaped(name, 200)}</bdi></strong>{drawing}</figure>")
        if kept:
            end = float(np.mean([line.y[-1] for line in kept])) / 100
            alt = f"{name}: in the last split the filter keeps {percent(end)} of the poisoned images"
            drawing = figures.curves(
                f"kept{number}", alt, kept, x_title="epoch", y_title="% of poisoned kept", percent=True
            )
            title = f"{name}: poisoned images that the filter keeps"
            parts.append(f"<figure><strong><bdi>{escaped(title, 240)}</bdi></strong>{drawing}</figure>")
    return "".join(parts)


def _row_name(row: Row, rows: Sequence[Row]) -> str:
    name = wording.method_name(row.method) + (f" ({row.variant})" if row.variant else "")
    return name if len({r.group for r in rows}) == 1 else f"{tables.title(row)} · {name}"


# -- the filter


def _defended(shown: Sequence[_Shown]) -> list[_Shown]:
    return [one for one in shown if one.run.method != FIRST]


def _reason(one: _Shown, file: str) -> str:
    return f"<p>Nothing to show: {escaped(one.run.missing.get(file, 'the file is missing'), 200)}.</p>"


def _no_defence() -> str:
    return "<p>Nothing to show: a run without defence ranks no samples.</p>"


def _not_told_apart(data: Data | str) -> str:
    """Why clean and poisoned samples are not told apart; empty where they are."""
    if isinstance(data, str):
        return f"Clean and poisoned images are not told apart: {data}."
    if data.truth is None:
        return "Clean and poisoned images are not told apart: the data set came without truth."
    return "" if data.truth.poisoned.any() else "The data carries no attack: no image is poisoned."


def _poisoned(data: Data | str) -> np.ndarray | None:
    return None if isinstance(data, str) or data.truth is None else data.truth.poisoned


def _filter(shown: Sequence[_Shown]) -> str:
    defended = _defended(shown)
    if not defended:
        return _no_defence()
    parts = [
        "<p>The loss of every training image under its given label, right after the warm-up and in the last split. "
        "The images left of the threshold keep their labels; the others are trained on without.</p>"
    ]
    for number, one in enumerate(defended):
        parts.append(_heading(one, defended))
        split = one.run.split
        if split is None:
            parts.append(_reason(one, "split.parquet"))
            continue
        poisoned = _poisoned(one.data)
        apart = poisoned is not None and bool(poisoned.any())
        parts.append(figures.bar_legend("clean" if apart else "all images", "poisoned" if apart else None))
        drawn = []
        for when, loss, kept in (
            ("right after the warm-up", split.first_loss, split.first_kept),
            ("in the last split", split.loss, split.kept),
        ):
            bins = figures.loss_histogram(loss, kept, poisoned)
            says = _says(bins)
            drawing = figures.loss_bars(f"h{number}{len(drawn)}", f"Losses {when}. {says}", bins)
            drawn.append(
                f"<figure><strong>{when.capitalize()}</strong>{drawing}<figcaption>{says}</figcaption></figure>"
            )
        parts.append(f'<div class="grid wide">{"".join(drawn)}</div>')
        if why := _not_told_apart(one.data):
            parts.append(f'<p class="note">{escaped(why, 300)}</p>')
    return "".join(parts) + _of_seeds(defended)


def _says(bins: figures.Histogram) -> str:
    text = f"Threshold {bins.threshold:.3f}: {bins.kept:,} of {bins.count:,} images keep their labels"
    if bins.poisoned is not None:
        text += f", among them {bins.kept_poisoned:,} of {bins.poisoned_count:,} poisoned ones"
    return text + "."


# -- features


_KINDS = {
    "ssl": ("Self-supervised features (DBD)", "self-supervised"),
    "supervised": ("Supervised features (no defence)", "supervised"),
}


def _features(shown: Sequence[_Shown]) -> str:
    intro = (
        "<p>Features of training images before the classifier, in the plane by t-SNE. Only the neighbourhood of points "
        "means something, not their axes. Where labels are learnt from, poisoned images gather around the trigger; "
        "where they are not, they should lie among images of their true class.</p>"
    )
    chosen: dict[str, _Shown] = {}
    for one in shown:
        if one.run.features is not None:
            chosen.setdefault(one.run.features.kind, one)
    if not chosen:
        reasons = list(dict.fromkeys(one.run.missing.get("features.npz", "the file is missing") for one in shown))
        return f"<p>Nothing to show: {escaped(wording.joined(reasons), 300)}.</p>"
    ordered = sorted(chosen.values(), key=lambda one: one.run.features is not None and one.run.features.kind != "ssl")
    drawn, notes, labels, crosses, names = [], [], set(), False, ()
    for number, one in enumerate(ordered[:2]):
        features = one.run.features
        assert features is not None
        poisoned = _poisoned(one.data)
        index = embedding.choose(features.index, poisoned)
        rows = {int(i): row for row, i in enumerate(features.index)}
        points = embedding.embed(features.features[[rows[int(i)] for i in index]])
        title, kind = _KINDS.get(
            features.kind, (f"{printable(features.kind, 40)} features", printable(features.kind, 40))
        )
        if isinstance(points, str):
            notes.append(f"No picture of the {kind} features: {points}.")
            continue
        given = None if isinstance(one.data, str) else one.data.labels[index]
        marked = None if poisoned is None else poisoned[index]
        count = 0 if marked is None else int(marked.sum())
        if given is not None and not isinstance(one.data, str):
            seen = given if marked is None else given[~marked]
            labels |= set(np.unique(seen).tolist())
            names = one.data.class_names if len(one.data.class_names) > len(names) else names
        crosses |= count > 0
        says = f"{len(index):,} training images" + (f", {count:,} of them poisoned" if count else "")
        drawing = figures.scatter(f"t{number}", f"{title}: {says}", points, given, marked)
        by = escaped(one.name, 200)
        caption = f"<figcaption>{says} · <bdi>{by}</bdi></figcaption>"
        drawn.append(f"<figure><strong>{escaped(title)}</strong>{drawing}{caption}</figure>")
        if why := _not_told_apart(one.data):
            notes.append(why)
    if len(chosen) == 1:
        other = "with the defence" if "supervised" in chosen else "without defence"
        notes.append(f"Name a run {other} too, to compare with its features.")
    legend = ""
    if labels:
        listed = sorted(labels)[: len(figures.CLASS_COLOURS)]
        legend = figures.label_legend(names, listed, crosses)
        if max(labels) >= len(figures.CLASS_COLOURS):
            notes.append(f"Colours repeat after {len(figures.CLASS_COLOURS)} classes.")
        legend = f'<p class="note">Colour: the given label.</p>{legend}' if drawn else ""
    below = "".join(f'<p class="note">{escaped(note, 300)}</p>' for note in dict.fromkeys(notes))
    return f'{intro}{legend}<div class="grid wide">{"".join(drawn)}</div>{below}{_of_seeds(ordered)}'


# -- suspects


def _suspects(shown: Sequence[_Shown]) -> str:
    defended = _defended(shown)
    if not defended:
        return _no_defence()
    parts = ["<p>Training images whose labels the filter dropped in the last split, highest loss first.</p>"]
    for one in defended:
        parts.append(_heading(one, defended))
        if one.run.split is None:
            parts.append(_reason(one, "split.parquet"))
        elif isinstance(one.data, str):
            parts.append(f"<p>The images cannot be shown: {escaped(one.data, 300)}.</p>")
        else:
            parts.append(gallery.as_html(one.data, one.run.split))
    return "".join(parts)


# -- classes


def _classes(rows: Sequence[Row], results: Sequence[Mapping[str, Any]], shown: Sequence[_Shown]) -> str:
    """Clean accuracy by class, a table for every group of rows that can be compared; mean over the runs of a row."""
    groups: dict[Any, list[Row]] = {}
    for row in rows[:SHOWN_ROWS]:
        groups.setdefault(row.group, []).append(row)
    parts = []
    for group in groups.values():
        columns = []
        for row in group:
            lists = [values for i in row.members if (values := results[i].get("per_class_acc"))]
            if lists and len({len(values) for values in lists}) == 1:
                columns.append((row, lists))
        width = {len(lists[0]) for _, lists in columns}
        if len(width) != 1:
            continue
        (count,) = width
        names = next(
            (
                one.data.class_names
                for one in shown
                if one.row in group and not isinstance(one.data, str) and len(one.data.class_names) == count
            ),
            tuple(f"class {i}" for i in range(count)),
        )
        head = "".join(f'<th scope="col"><bdi>{escaped(_row_name(row, group), 160)}</bdi></th>' for row, _ in columns)
        lines = []
        for i in range(count):
            cells = "".join(f"<td>{_mean_percent([values[i] for values in lists])}</td>" for _, lists in columns)
            lines.append(f'<tr><th scope="row"><bdi>{escaped(names[i], 60)}</bdi></th>{cells}</tr>')
        table = (
            f'<div class="scroll"><table class="numbers"><thead><tr><th scope="col">class</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
        title = f" · {tables.title(group[0])}" if len(groups) > 1 else ""
        parts.append(
            f"<details><summary>Clean test images by class, in %{escaped(title, 240)}</summary>{table}</details>"
        )
    return "".join(parts)


def _mean_percent(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{100 * sum(present) / len(present):.1f}" if present else "–"


# -- settings


def _settings(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs[:50]:
        about = {
            "folder": str(run.folder),
            "data set": run.dataset,
            "data hash": run.data_hash,
            "started": run.description.get("started"),
            "commit": run.description.get("commit"),
            "state": run.state,
        }
        result = run.result or {}
        if result.get("device"):
            about["device"] = (
                f"{result['device']}, {result.get('world_size') or 1} worker(s), {result.get('precision')}"
            )
        for stage, seconds in (result.get("seconds") or {}).items():
            about[f"time, {wording.stage_name(stage)}"] = wording.duration(seconds)
        for name in ("host", "versions"):
            if isinstance(run.description.get(name), Mapping):
                about |= {f"{name}: {key}": value for key, value in settings.flat(run.description[name])}
        summary = f"{_name(run, None)} · {printable(run.folder.name, 60)}"
        parts.append(
            f"<details><summary><bdi>{escaped(summary, 200)}</bdi></summary>"
            f"{_pairs('This run', about)}{_pairs('Configuration', dict(settings.flat(run.config)))}</details>"
        )
    if len(runs) > 50:
        parts.append(f'<p class="note">The first 50 of {len(runs)} runs.</p>')
    return "".join(parts)


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value, 300)}</td></tr>'
        for name, value in values.items()
        if value is not None
    )
    return f'<h3>{escaped(title)}</h3><div class="scroll"><table><tbody>{lines}</tbody></table></div>'
