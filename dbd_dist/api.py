"""The same as the commands, from Python: train, measure, report, open runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.launch.start import STORAGE, check_before_data, launch_staged, prepare_for, stage_storage
from dbd_dist.presets import preset as find_preset
from dbd_dist.runtime.bucket.folder import local_folder

if TYPE_CHECKING:
    from dbd_dist.evaluation.evaluator import EvalResult
    from dbd_dist.reporting.runs import Run


def train(
    start: str | TrainConfig,
    *,
    method: str | None = None,
    data: str | Path | None = None,
    seed: int | None = None,
    name: str | None = None,
    storage: str | Path = STORAGE,
    launcher: Literal["ray", "local"] = "local",
    settings: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Run:
    """Train, or resume, one run.

    Args:
        start: name of a preset, or a whole configuration.
        method: name of a method; "dbd" with a preset unless given. A configuration has its own.
        data: dataset folder, as `prepare` writes it; the preset's own unless given.
        seed: of weights, order, augmentation and mixing.
        name: of the run, its folder under the storage; PRESET-METHOD-sSEED unless given.
        launcher: "local" runs in this process; "ray" on Ray Train workers.
        settings: fields to change by dotted names, e.g. ``{"simclr.epochs": 20, "compute.threads": 1}``.
        quiet: shows no progress.

    Returns:
        The run; its `result` is None where `stop_after` ended it before there was one.

    Raises:
        UserError: a mistake in what was asked for.
        RunFailed: Ray, a worker or the machine failed.
    """
    prepared = find_preset(start) if isinstance(start, str) else None
    if prepared is None:
        config = start
        if method not in (None, config.method.name):  # type: ignore[union-attr]
            raise UserError("a configuration has its method already", where="method", expected="none, or a preset")
    else:
        config = prepared.config(method or "dbd")
    assert isinstance(config, TrainConfig)
    config = override(config, dict(settings or {}) | ({} if seed is None else {"seed": seed}))
    if data is not None:
        config = dataclasses.replace(config, data=Path(data))
    name = name if name is not None else f"{config.preset}-{config.method.name}-s{config.seed}"
    check_before_data(config, name, launcher)
    staging = stage_storage(storage)
    place = Path(storage) if staging is None else staging.folder
    if config.data is None:
        if prepared is None:
            raise UserError("no dataset folder is given", where="data", hint="make one with `prepare`")
        config = dataclasses.replace(config, data=prepare_for(prepared, config.seed, place, config.method))
    launch_staged(config, staging, place, name, launcher, quiet=quiet)
    return open_run(place / name if staging is None else f"{str(storage).partition('?')[0].rstrip('/')}/{name}")


def open_run(folder: str | Path) -> Run:
    """A run folder: its description, metrics, split, and result where it has one.

    Args:
        folder: or the address of a run in an object store, which is fetched.

    Raises:
        UserError: it is not a run folder, or a file in it is damaged.
    """
    from dbd_dist.reporting.runs import load_run

    return load_run(local_folder(folder))


def evaluate(run: str | Path | Run, data: str | Path | None = None) -> EvalResult:
    """Measure a run's model: accuracy on clean test images, attack success, robust and per-class accuracy.

    Args:
        data: dataset folder; the run's own unless given.

    Raises:
        UserError: the run exported no model, or the data set does not fit it.
    """
    from dbd_dist.evaluation.exported import measure_run

    return measure_run(_folder(run), None if data is None else Path(data))


def report(runs: Sequence[str | Path | Run], out: str | Path | None = None) -> str:
    """The table of some runs as Markdown; with `out` also the whole report, as one HTML page.

    Raises:
        UserError: one of them is no run folder, or `out` cannot be written.
    """
    from dbd_dist.reporting import tables
    from dbd_dist.reporting.page import write_report
    from dbd_dist.reporting.runs import load_run
    from dbd_dist.reporting.settings import results_of

    folders = [_folder(run) for run in runs]
    if out is not None:
        write_report(folders, Path(out))
    return tables.as_markdown(tables.aggregate(*results_of([load_run(folder, arrays=False) for folder in folders])))


def _folder(run: str | Path | Run) -> Path:
    return local_folder(run) if isinstance(run, str | Path) else run.folder
