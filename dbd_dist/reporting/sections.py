"""What the sections of the page show, computed for its templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbd_dist.reporting import embedding, figures, gallery, names, settings, tables, wording
from dbd_dist.reporting.curves import Figure
from dbd_dist.reporting.figures import CLASS_COLOURS
from dbd_dist.reporting.runs import Run
from dbd_dist.reporting.shown import SHOWN_ROWS, Shown, run_name, stand_ins
from dbd_dist.reporting.tables import Row
from dbd_dist.reporting.wording import printable

SHOWN_SETTINGS = 50
"""Runs whose settings are listed."""
Section = Mapping[str, Any]
"""Values by the names that the template has for them."""


def result(runs: Sequence[Run], rows: Sequence[Row]) -> Section:
    """The table over seeds, a body a group, and what there is to say about it."""
    notes = tables.notes(rows)
    notes += [f"{printable(run.folder.name, 60)} is not in the table: {run.state}." for run in runs if not run.result]
    devices = dict.fromkeys(device for row in rows for device in row.devices)
    if devices:
        notes.append(f"Hardware: {'; '.join(devices)}.")
    notes.append(
        "ASR: attack success rate, the share of triggered test images of other classes that are classified as the "
        "target. Robust accuracy: the share of them that are classified as what they are."
    )
    if len(rows) > SHOWN_ROWS:
        notes.append(f"The sections below show the first {SHOWN_ROWS} rows.")
    return {"groups": tables.grouped(rows), "notes": notes}


def filtering(shown: Sequence[Shown]) -> Section:
    """Histograms of the losses that the filter ranked, for every defence."""
    defended = [one for one in shown if one.run.defends or one.run.split is not None]
    runs = []
    for number, one in enumerate(defended):
        split, poisoned = one.run.split, one.poisoned
        drawn = []
        if split is not None:
            for when, loss, kept in (
                ("Right after the warm-up", split.first_loss, split.first_kept),
                ("In the last split", split.loss, split.kept),
            ):
                bins = figures.loss_histogram(loss, kept, poisoned)
                caption = _caption(bins)
                drawing = figures.loss_bars(f"h{number}{len(drawn)}", f"Losses, {when.lower()}. {caption}", bins)
                drawn.append(Figure(when, drawing, caption))
        runs.append(
            {
                "name": one.name,
                "reason": "" if drawn else one.run.missing["split.parquet"],
                "apart": poisoned is not None and bool(poisoned.any()),
                "figures": drawn,
                "note": one.not_apart if drawn else "",
            }
        )
    return {"runs": runs, "note": stand_ins(defended)}


def _caption(bins: figures.Histogram) -> str:
    text = f"Threshold {bins.threshold:.3f}: {bins.kept:,} of {bins.count:,} images keep their labels"
    if bins.poisoned is not None:
        text += f", among them {bins.kept_poisoned:,} of {bins.poisoned_count:,} poisoned ones"
    return text + "."


_KINDS = {"ssl": "self-supervised", "supervised": "supervised"}
"""How the backbone was trained, by `kind` of features.npz."""


def features(shown: Sequence[Shown]) -> Section:
    """Features in the plane, of the first run of each kind."""
    chosen: dict[str, Shown] = {}
    for one in shown:
        if one.run.features is not None:
            chosen.setdefault(one.run.features.kind, one)
    if not chosen:
        reasons = dict.fromkeys(one.run.missing["features.npz"] for one in shown)
        return {"reason": wording.joined(reasons)}
    ordered = [chosen[kind] for kind in sorted(chosen, key=lambda kind: kind != "ssl")][:2]
    drawn, notes, labels, crosses, class_names = [], [], set(), False, ()
    for number, one in enumerate(ordered):
        index = embedding.choose(_features(one).index, one.poisoned)
        marked = None if one.poisoned is None else one.poisoned[index]
        picture = _picture(number, one, index, marked)
        if isinstance(picture, str):
            notes.append(picture)
            continue
        drawn.append(picture)
        if not isinstance(one.data, str):
            given = one.data.labels[index]
            labels |= set(np.unique(given if marked is None else given[~marked]).tolist())
            class_names = max(class_names, one.data.class_names, key=len)
        crosses |= marked is not None and bool(marked.any())
        notes.append(one.not_apart)
    if len(chosen) == 1:
        other = "without defence" if ordered[0].run.defends else "with the defence"
        notes.append(f"Name a run {other} too, to compare with its features.")
    listed = sorted(labels)[: len(CLASS_COLOURS)] if drawn else []
    if labels and max(labels) >= len(CLASS_COLOURS):
        notes.append(f"Colours repeat after {len(CLASS_COLOURS)} classes.")
    notes.append(stand_ins(ordered))
    return {
        "figures": drawn,
        "keys": [(CLASS_COLOURS[label], class_names[label]) for label in listed],
        "crosses": crosses,
        "notes": [note for note in dict.fromkeys(notes) if note],
    }


def _features(one: Shown) -> Any:
    assert one.run.features is not None
    return one.run.features


def _picture(number: int, one: Shown, index: np.ndarray, marked: np.ndarray | None) -> Figure | str:
    """The samples `index` in the plane; a sentence where their features make no picture."""
    stored = _features(one)
    kind = _KINDS.get(stored.kind, printable(stored.kind, 40))
    position = {sample: row for row, sample in enumerate(stored.index.tolist())}
    points = embedding.embed(stored.features[[position[sample] for sample in index.tolist()]])
    if isinstance(points, str):
        return f"No picture of the {kind} features: {points}."
    given = None if isinstance(one.data, str) else one.data.labels[index]
    count = 0 if marked is None else int(marked.sum())
    caption = f"{len(index):,} training images" + (f", {count:,} of them poisoned" if count else "")
    title = f"{kind[:1].upper()}{kind[1:]} features ({names.method_name(printable(one.run.method, 40))})"
    drawing = figures.scatter(f"t{number}", f"{title}: {caption}", points, given, marked)
    return Figure(title, drawing, caption, by=one.name)


def suspects(shown: Sequence[Shown]) -> list[Section]:
    """The images that each defence trusted least."""
    found = []
    for one in shown:
        if not one.run.defends and one.run.split is None:
            continue
        section: dict[str, Any] = {"name": one.name, "images": [], "summary": "", "reason": ""}
        if one.run.split is None:
            section["reason"] = f"Nothing to show: {one.run.missing['split.parquet']}."
        elif isinstance(one.data, str):
            section["reason"] = f"The images cannot be shown: {one.data}."
        elif images := gallery.gallery(one.data, one.run.split):
            section |= {"images": images, "summary": gallery.summary(one.data, one.run.split)}
        else:
            section["reason"] = "The filter kept every label."
        found.append(section)
    return found


def classes(rows: Sequence[Row], results: Sequence[Mapping[str, Any]], shown: Sequence[Shown]) -> list[Section]:
    """Clean accuracy by class, a table for every group of rows that can be compared; mean over the runs of a row."""
    sections = []
    for group in tables.grouped(rows[:SHOWN_ROWS]):
        columns = []
        for row in group:
            lists = [values for i in row.members if (values := results[i].get("per_class_acc"))]
            if len({len(values) for values in lists}) == 1:
                columns.append((tables.row_name(row, group), lists))
        if len({len(lists[0]) for _, lists in columns}) != 1:
            continue
        count = len(columns[0][1][0])
        cells = [[_mean_percent([values[i] for values in lists]) for _, lists in columns] for i in range(count)]
        sections.append(
            {
                "title": tables.title(group[0]),
                "columns": [name for name, _ in columns],
                "lines": list(zip(_class_names(group, shown, count), cells, strict=True)),
            }
        )
    return sections


def _class_names(group: Sequence[Row], shown: Sequence[Shown], count: int) -> Sequence[str]:
    for one in shown:
        if one.row in group and not isinstance(one.data, str) and len(one.data.class_names) == count:
            return one.data.class_names
    return [f"class {i}" for i in range(count)]


def _mean_percent(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{100 * sum(present) / len(present):.1f}" if present else "–"


def settings_of(runs: Sequence[Run]) -> Section:
    """What every run was made with."""
    listed = []
    for run in runs[:SHOWN_SETTINGS]:
        done = run.result or {}
        about = {
            "folder": str(run.folder),
            "data set": run.dataset,
            "data hash": run.data_hash,
            "started": run.description.get("started"),
            "commit": run.description.get("commit"),
            "state": run.state,
        }
        if done.get("device"):
            about["device"] = f"{done['device']}, {done.get('world_size') or 1} worker(s), {done.get('precision')}"
        for stage, seconds in (done.get("seconds") or {}).items():
            about[f"time, {names.stage_name(stage)}"] = wording.duration(seconds)
        for name in ("host", "versions"):
            if isinstance(run.description.get(name), Mapping):
                about |= {f"{name}: {key}": value for key, value in settings.flat(run.description[name])}
        summary = f"{run_name(run)} · {printable(run.folder.name, 60)}"
        tables_of_run = {"This run": about, "Configuration": dict(settings.flat(run.config))}
        listed.append({"summary": summary, "tables": tables_of_run})
    return {"runs": listed, "count": len(runs)}
