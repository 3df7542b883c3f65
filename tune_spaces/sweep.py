"""A sweep: shared stages once, then one Ray Train run a trial, scheduled by Ray Tune."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from cluster import session, topology
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.json import read_json, write_json
from dbd_dist.config import TrainConfig, override
from dbd_dist.launch.failures import RunFailed
from dbd_dist.launch.ray_train import WORKER_ENV, run_ray
from dbd_dist.runtime import runner
from dbd_dist.runtime.disk import check_sweep
from dbd_dist.runtime.run_folder import RunFolder
from tune_spaces.space import Space

GRID_FILE = "grid.json"
SWEEP_FILE = "sweep.json"
TRIAL_CPU = 0.01  # a trial's own function starts workers and waits for them; Ray refuses 0


def run_sweep(
    base: TrainConfig, space: Space, *, storage: Path, name: str, parallel: int | None
) -> list[dict[str, Any]]:
    """Run every point of the grid.

    Args:
        base: what all trials have in common; `compute.workers` is the size of each.
        parallel: trials at the same time; as many as the cluster holds unless given.

    Returns:
        A row a trial, best first: the varied fields, "clean_acc", "asr", "kept_poisoned", "poisoned", "score",
        "folder". The score is clean accuracy minus ASR, which needs the truth: a defender sees the first part only.

    Raises:
        UserError: a point of the grid does not fit the data, or the folder holds a sweep over another grid, or
            another process is at work on it, or there is no room for its runs.
    """
    storage = storage.resolve()
    _check(base, space, storage / name)
    with lock.held(storage / name / lock.FILE, str(storage / name)):
        return _run(base, space, storage, name, parallel)


def _run(base: TrainConfig, space: Space, storage: Path, name: str, parallel: int | None) -> list[dict[str, Any]]:
    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    with session.connect(dashboard=True):
        available = topology.from_ray()
        workers = base.compute.workers or 1
        resources = topology.worker_resources(
            available, workers=workers, use_gpu=None if base.compute.device != "cpu" else False
        )
        slots = sum(min(n.cpus, n.gpus) if resources.use_gpu else n.cpus for n in available.nodes) // workers
        parallel = max(1, min(parallel or slots, slots, space.size))
        threads = topology.worker_resources(
            available, workers=workers, use_gpu=resources.use_gpu, runs=parallel
        ).cpus_per_worker
        cpus = threads * 0.9  # leaves room for TRIAL_CPU
        base = dataclasses.replace(base, compute=dataclasses.replace(base.compute, workers=workers))
        if space.shared_stage is not None:
            shared = dataclasses.replace(base, stop_after=space.shared_stage)  # type: ignore[arg-type]
            print(f"shared by all {space.size} trials: {space.shared_stage}", flush=True)
            run_ray(shared, storage=storage, name=f"{name}/{space.shared_stage}")
        base = dataclasses.replace(base, compute=dataclasses.replace(base.compute, threads=threads))
        results = _tune(base, space, storage, name, parallel, cpus)
    rows = [_row(space, storage / name / trial) for trial in results]
    rows.sort(key=lambda row: (-row["score"], row["folder"]))
    write_json(storage / name / SWEEP_FILE, {"space": _grid(space), "trials": rows})
    return rows


def _check(base: TrainConfig, space: Space, folder: Path) -> None:
    """What can be refused before anything starts, rather than by a trial minutes later."""
    assert base.data is not None
    dataset = open_dataset(base.data)
    for point in space.points:
        runner.check(override(base, point), dataset, base.compute.workers or 1)
    stored = folder / GRID_FILE
    if stored.exists() and _stored(stored) != _grid(space):
        raise UserError(
            "this sweep exists with another grid",  # and Tune would continue that one
            where=folder,
            expected="the same space, to continue it",
            hint="choose another --name, or delete the folder",
        )
    if not (folder / SWEEP_FILE).exists():
        check_sweep((override(base, point) for point in space.points), dataset, folder)


def _stored(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"not the grid of a sweep ({error})", where=path, hint="choose another --name") from error


def _grid(space: Space) -> dict[str, list[Any]]:
    return {field: list(values) for field, values in space.grid.items()}


def _tune(base: TrainConfig, space: Space, storage: Path, name: str, parallel: int, cpus: float) -> list[str]:
    """Run the trials; returns the folder of each under the sweep's."""
    from ray import tune

    fixed = {"base": base.to_dict(), "storage": str(storage), "name": name, "cpus": cpus}
    trainable = tune.with_resources(tune.with_parameters(_trial, fixed=fixed), {"CPU": TRIAL_CPU})
    folder = storage / name / "tune"
    if tune.Tuner.can_restore(str(folder)):
        tuner = tune.Tuner.restore(str(folder), trainable=trainable, resume_unfinished=True, restart_errored=True)
    else:
        write_json(storage / name / GRID_FILE, _grid(space))
        tuner = tune.Tuner(
            trainable,
            param_space={field: tune.grid_search(values) for field, values in _grid(space).items()},
            tune_config=tune.TuneConfig(max_concurrent_trials=parallel),
            run_config=tune.RunConfig(name=folder.name, storage_path=str(folder.parent), verbose=0),
        )
    total = space.size
    print(f"{total} trials, {parallel} at a time", flush=True)
    grid = tuner.fit()
    if grid.errors:
        first = (str(grid.errors[0]).strip().splitlines() or [type(grid.errors[0]).__name__])[-1]
        raise RunFailed(
            f"{len(grid.errors)} of {total} trials failed, the first with: {first}",
            where=storage / name,
            hint="the same command tries those again",
        )
    return [str((result.metrics or {})["trial_folder"]) for result in grid]


def _trial(values: dict[str, Any], *, fixed: dict[str, Any]) -> None:
    """One trial: a Ray Train run, whose reports reach Tune through a callback."""
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    config = override(TrainConfig.from_dict(fixed["base"]), values)
    trial = "trial-" + tune.get_context().get_trial_id().rsplit("_", 1)[-1]
    storage, name = Path(fixed["storage"]), f"{fixed['name']}/{trial}"
    result = run_ray(
        config,
        storage=storage,
        name=name,
        quiet=True,
        cpus_per_worker=fixed["cpus"],
        callbacks=[TuneReportCallback()],
    )
    assert result is not None
    tune.report(
        {
            "score": _score(result),
            "clean_acc": result["clean_acc"],
            "asr": result["asr"],
            "trial_folder": trial,
        }
    )


def _score(result: dict[str, Any]) -> float:
    return result["clean_acc"] - (result["asr"] or 0.0)


def _row(space: Space, folder: Path) -> dict[str, Any]:
    result = RunFolder(folder).result() or {}
    config: dict[str, Any] = read_json(folder / "run.json")["config"]
    row: dict[str, Any] = {}
    for field in space.grid:
        value: Any = config
        for part in field.split("."):
            value = value[part]
        row[field] = value
    row |= {key: result[key] for key in ("clean_acc", "asr", "kept_poisoned", "poisoned", "reused_stages")}
    return row | {"score": _score(result), "folder": str(folder)}
