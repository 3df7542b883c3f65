"""What the sections of the page show beside tables and curves, computed for its templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dbd_dist.reporting import embedding, figures, settings, tables, wording
from dbd_dist.reporting.curves import Figure
from dbd_dist.reporting.figures import CLASS_COLOURS
from dbd_dist.reporting.runs import Run
from dbd_dist.reporting.shown import Shown, stand_ins
from dbd_dist.reporting.tables import Row
from dbd_dist.reporting.wording import printable


def histograms(one: Shown, number: int) -> list[Figure]:
    """Losses that the filter ranked, in the first and the last split; `number` keeps ids apart on the page."""
    split = one.run.split
    assert split is not None
    drawn = []
    for when, loss, kept in (
        ("Right after the warm-up", split.first_loss, split.first_kept),
        ("In the last split", split.loss, split.kept),
    ):
        bins = figures.loss_histogram(loss, kept, one.poisoned)
        caption = f"Threshold {bins.threshold:.3f}: {bins.kept:,} of {bins.count:,} images keep their labels"
        if bins.poisoned is not None:
            caption += f", among them {bins.kept_poisoned:,} of {bins.poisoned_count:,} poisoned ones"
        drawing = figures.loss_bars(f"h{number}{len(drawn)}", f"Losses, {when.lower()}. {caption}.", bins)
        drawn.append(Figure(when, drawing, f"{caption}."))
    return drawn


_KINDS = {"ssl": "self-supervised", "supervised": "supervised"}
"""How the backbone was trained, by `kind` of features.npz."""


def features(shown: Sequence[Shown]) -> Mapping[str, Any]:
    """Features in the plane, of the first run of each kind: figures, legend and notes, or the reason for none."""
    chosen: dict[str, Shown] = {}
    for one in shown:
        if one.run.features is not None:
            chosen.setdefault(one.run.features.kind, one)
    if not chosen:
        return {"reason": wording.joined(dict.fromkeys(one.run.missing["features.npz"] for one in shown))}
    ordered = [chosen[kind] for kind in sorted(chosen, key=lambda kind: kind != "ssl")][:2]
    drawn, notes, labels, crosses, class_names = [], [], set(), False, ()
    for number, one in enumerate(ordered):
        index, picture = _picture(number, one)
        if isinstance(picture, str):
            notes.append(picture)
            continue
        drawn.append(picture)
        marked = np.zeros(len(index), dtype=bool) if one.poisoned is None else one.poisoned[index]
        if not isinstance(one.data, str):
            labels |= set(one.data.labels[index[~marked]].tolist())
            class_names = max(class_names, one.data.manifest.class_names, key=len)
        crosses |= bool(marked.any())
        notes.append(one.not_apart)
    if len(chosen) == 1:
        other = "without defence" if ordered[0].run.defends else "with the defence"
        notes.append(f"Name a run {other} too, to compare with its features.")
    if labels and max(labels) >= len(CLASS_COLOURS):
        notes.append(f"Colours repeat after {len(CLASS_COLOURS)} classes.")
    keys = [(CLASS_COLOURS[label], class_names[label]) for label in sorted(labels)[: len(CLASS_COLOURS)]]
    notes = list(dict.fromkeys([*notes, stand_ins(ordered)]))
    return {"reason": "", "figures": drawn, "legend": keys, "crosses": crosses, "notes": notes}


def _picture(number: int, one: Shown) -> tuple[np.ndarray, Figure | str]:
    """Which samples are shown, and a figure of them or a sentence on why there is none."""
    stored = one.run.features
    assert stored is not None
    kind = _KINDS.get(stored.kind, printable(stored.kind, 40))
    index = embedding.choose(stored.index, one.poisoned)
    position = {sample: row for row, sample in enumerate(stored.index.tolist())}
    points = embedding.embed(stored.features[[position[sample] for sample in index.tolist()]])
    if isinstance(points, str):
        return index, f"No picture of the {kind} features: {points}."
    given = None if isinstance(one.data, str) else one.data.labels[index]
    marked = None if one.poisoned is None else one.poisoned[index]
    count = 0 if marked is None else int(marked.sum())
    caption = f"{len(index):,} training images" + (f", {count:,} of them poisoned" if count else "")
    title = f"{kind[:1].upper()}{kind[1:]} features ({printable(one.run.title(), 40)})"
    drawing = figures.scatter(f"t{number}", f"{title}: {caption}", points, given, marked)
    return index, Figure(title, drawing, caption, by=one.name)


def classes(group: Sequence[Row], shown: Sequence[Shown]) -> Mapping[str, Any] | None:
    """Clean accuracy by class for rows that can be compared, mean over the runs of a row; None where there is none."""
    columns = {}
    for row in group:
        lists = [values for values in row.values("per_class_acc") if values]
        if len({len(values) for values in lists}) == 1:
            columns[tables.row_name(row, group)] = lists
    counts = {len(lists[0]) for lists in columns.values()}
    if len(counts) != 1:
        return None
    (count,) = counts
    class_names: Sequence[str] = [f"class {i}" for i in range(count)]
    for one in shown:
        if one.row in group and not isinstance(one.data, str) and one.data.manifest.num_classes == count:
            class_names = one.data.manifest.class_names
    cells = [[_mean_percent([values[i] for values in lists]) for lists in columns.values()] for i in range(count)]
    return {"columns": list(columns), "lines": list(zip(class_names, cells, strict=True))}


def _mean_percent(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    return f"{100 * sum(present) / len(present):.1f}" if present else "–"


def about(run: Run) -> dict[str, Any]:
    """What a run was made with, beside its configuration."""
    values = {"folder": run.folder, "data set": run.dataset, "data hash": run.data_hash}
    values |= {name: run.description.get(name) for name in ("started", "commit")} | {"state": run.state}
    done = run.result or {}
    if done.get("device"):
        values["device"] = f"{done['device']}, {done.get('world_size') or 1} worker(s), {done.get('precision')}"
    for stage, seconds in (done.get("seconds") or {}).items():
        values[f"time, {run.title(stage)}"] = wording.duration(seconds)
    for name in ("host", "versions"):
        if isinstance(run.description.get(name), Mapping):
            values |= {f"{name}: {key}": value for key, value in settings.flat(run.description[name]).items()}
    return {name: value for name, value in values.items() if value is not None}
