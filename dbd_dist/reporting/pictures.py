"""`dbd report --figures DIR`: figures of some runs as PNG and SVG. Which there are follows from what the runs left."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton import BetonStream
from data_prep.errors import UserError
from data_prep.io.atomic import replacing
from dbd_dist.reporting import curves, embedding, figures, plates, tables
from dbd_dist.reporting.arrays import Split
from dbd_dist.reporting.data import Data, find_data
from dbd_dist.reporting.runs import Run, load_run
from dbd_dist.reporting.wording import joined

SUFFIXES = ("png", "svg")
COUNTS = 60
"""Points of a detection curve."""


def write_figures(folders: Sequence[Path], out: Path) -> tuple[list[Path], list[str]]:
    """Write every figure that the runs have the material for.

    Args:
        folders: of finished runs; of one data set, method and preset the lowest seed stands for all in figures of
            single samples.

    Returns:
        The files, and why figures are missing.

    Raises:
        UserError: a file of a run or of its data set is damaged, or `out` cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot be made ({error.strerror})", where=out, hint="choose another --figures") from error
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed or 0):
        groups.setdefault(_group(run), []).append(run)
    drawn: dict[str, Any] = {}
    notes: list[str] = []
    with plates.style():
        columns = []
        for name, members in groups.items():
            data = {run.data_hash: find_data(run) for run in _first_seed(members)}
            for kind, made in (
                ("tsne", _clouds(members, data)),
                ("losses", _losses(members, data)),
                ("detection", _detection(members, data)),
                ("epochs", _epochs(members)),
            ):
                if isinstance(made, str):
                    notes.append(f"no {kind} of {name}: {made}")
                else:
                    drawn[f"{kind}-{name}" if len(groups) > 1 else kind] = made
            for title in dict.fromkeys(run.title() for run in members if run.changes_input):
                notes.append(f"{title} is not in epochs: between epochs the model is measured without it")
            column = _column(data)
            columns += [] if column is None else [column]
        if columns:
            drawn["attacks"] = plates.gallery(columns)
        if seconds := _costs(runs):
            drawn["cost"] = plates.costs(seconds)
        return _save(drawn, out), notes


def _group(run: Run) -> str:
    """Names what runs can share a figure by: data set without its seed, and preset; fit for a file name."""
    result = run.result or {"dataset": run.dataset}
    name = f"{tables.family(result)}-{result.get('preset') or 'custom'}"
    return re.sub(r"[^\w.=+-]+", "_", name)[:100]


def _save(drawn: Mapping[str, Any], out: Path) -> list[Path]:
    written = []
    try:
        for name, figure in drawn.items():
            for suffix in SUFFIXES:
                path = out / f"{name}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else None
                with replacing(path) as partial:
                    figure.savefig(partial, format=suffix, metadata=metadata)
                written.append(path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=out, hint="choose another --figures") from error
    return written


def _first_seed(members: Sequence[Run]) -> list[Run]:
    """A run of each method: that of the lowest seed."""
    found: dict[str, Run] = {}
    for run in members:
        found.setdefault(run.title(), run)
    return list(found.values())


Found = Mapping[str | None, Data | str]
"""By data hash."""


def _known(run: Run, data: Found) -> Data | str:
    """A run's data with truth and poisoned samples, or why there is none."""
    found = data[run.data_hash]
    if isinstance(found, str):
        return found
    return "it is not known which samples are poisoned" if found.truth is None else found


def _clouds(members: Sequence[Run], data: Found) -> Any:
    """Supervised beside self-supervised features."""
    chosen: dict[str, Run] = {}
    for run in _first_seed(members):
        if run.features is not None:
            chosen.setdefault(run.features.kind, run)
    parts = []
    for kind, title in (("supervised", "supervised"), ("ssl", "self-supervised")):
        if kind not in chosen:
            continue
        run = chosen[kind]
        known = _known(run, data)
        if isinstance(known, str):
            return known
        assert run.features is not None
        assert known.truth is not None
        index = embedding.choose(run.features.index, known.truth.poisoned)
        points = embedding.embed(run.features.features[np.searchsorted(run.features.index, index)])
        if isinstance(points, str):
            return points
        parts.append(
            plates.Cloud(
                title=f"{title} features ({run.title()})",
                points=points,
                labels=known.labels[index],
                poisoned=known.truth.poisoned[index],
                class_names=known.manifest.class_names,
            )
        )
    return plates.clouds(parts) if parts else "no run left features"


def _ranked(run: Run) -> Split | None:
    """How a run ranks samples, whether it acts on it or not."""
    return run.ranking if run.split is None else run.split


_LOSSES = {"sce": "symmetric cross-entropy (SCE)", "ce": "cross-entropy (CE)"}


def _losses(members: Sequence[Run], data: Found) -> Any:
    """First split under SCE beside that under CE."""
    chosen: dict[str, Run] = {}
    for run in _first_seed(members):
        loss = (run.config.get("warmup") or {}).get("loss", "sce")
        if _ranked(run) is not None and loss in _LOSSES:
            chosen.setdefault(loss, run)
    parts = []
    for loss, title in _LOSSES.items():
        if loss in chosen:
            run = chosen[loss]
            known = _known(run, data)
            poisoned = None if isinstance(known, str) or known.truth is None else known.truth.poisoned
            split = _ranked(run)
            assert split is not None
            bins = figures.loss_histogram(split.first_loss, split.first_kept, poisoned)
            auroc = None if poisoned is None else _auroc(split.first_loss, poisoned)
            parts.append((title if auroc is None else f"{title}, AUROC {auroc:.3f}", bins))
    return plates.histograms(parts) if parts else "no run ranks samples after a head warm-up"


def _auroc(loss: np.ndarray, poisoned: np.ndarray) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(poisoned, loss)) if poisoned.any() and not poisoned.all() else None


def _detection(members: Sequence[Run], data: Found) -> Any:
    """Rankings of the first and the last split of every method that has them."""
    rankings, reasons = [], ["no run ranks samples"]
    for run in _first_seed(members):
        split = _ranked(run)
        if split is None:
            continue
        known = _known(run, data)
        if isinstance(known, str):
            reasons.append(known)
            continue
        assert known.truth is not None
        if not known.truth.poisoned.any():
            reasons.append("no sample is poisoned")
            continue
        for when, loss in (("first split", split.first_loss), ("last split", split.loss)):
            if when == "last split" and np.array_equal(loss, split.first_loss):
                continue
            rankings.append(_ranking(f"{run.title()}, {when}", loss, known))
    return plates.detection(rankings) if rankings else reasons[-1]


def _ranking(title: str, loss: np.ndarray, data: Data) -> plates.Ranking:
    from sklearn.metrics import roc_curve

    assert data.truth is not None
    poisoned, target = data.truth.poisoned, data.manifest.target
    fpr, tpr, _ = roc_curve(poisoned, loss)
    of = np.ones(len(poisoned), dtype=bool) if target is None else data.labels == target
    ranked = poisoned[of][np.argsort(-loss[of], kind="stable")]
    most = min(len(ranked), 4 * int(poisoned.sum()))  # beyond that a curve only falls to the base rate
    counts = np.unique(np.linspace(1, most, COUNTS).astype(int))
    return plates.Ranking(
        title=title, fpr=fpr, tpr=tpr, counts=counts, precision=np.cumsum(ranked)[counts - 1] / counts,
        poisoned=int(poisoned.sum()),
    )  # fmt: skip


def _epochs(members: Sequence[Run]) -> Any:
    """Clean accuracy and attack success over epochs, every run."""
    found: dict[str, dict[str, list[tuple[Sequence[float], Sequence[float]]]]] = {"clean_acc": {}, "asr": {}}
    for run in members:
        for field, lines in found.items():
            for line in curves.measured_line(run, field):
                lines.setdefault(run.title(), []).append((line.x, line.y))
    if not found["clean_acc"]:
        return "accuracy was not measured between epochs"
    return plates.epochs(found["clean_acc"], found["asr"])


def _column(data: Found) -> tuple[str, np.ndarray, np.ndarray] | None:
    """The first test image of another class than the target, without and with the trigger."""
    for known in data.values():
        if isinstance(known, str) or "test_triggered" not in known.manifest.counts:
            continue
        manifest, images = known.manifest, []
        for split in ("test", "test_triggered"):
            count = manifest.counts[split]
            path = known.folder / f"{split}.beton"
            with BetonStream(path, expect_count=count, expect_px=manifest.image_px) as stream:
                at = int(np.flatnonzero(stream.labels != manifest.target)[0])
                images.append(next(stream.batches(np.array([at]), 1))[0][0].copy())
        return str(manifest.attack["kind"]), images[0], images[1]
    return None


def _costs(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Mean seconds of every stage by method, and by preset where there are several."""
    presets = {(run.result or {}).get("preset") for run in runs}
    spent: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        name = run.title() + (f" ({(run.result or {}).get('preset')})" if len(presets) > 1 else "")
        for stage, seconds in ((run.result or {}).get("seconds") or {}).items():
            spent.setdefault(name, {}).setdefault(run.title(stage), []).append(seconds)
    return {name: {stage: sum(v) / len(v) for stage, v in stages.items()} for name, stages in spent.items()}


def summary(paths: Sequence[Path], notes: Sequence[str]) -> str:
    """What was written, for the terminal."""
    names = joined(dict.fromkeys(path.stem for path in paths)) or "nothing"
    where = f"{paths[0].parent}: " if paths else ""
    return "\n".join([f"{where}{names}, as PNG and SVG", *notes])
