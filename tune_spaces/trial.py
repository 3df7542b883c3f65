"""What one trial does: a run for each seed, and what came of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.io import lock
from dbd_dist.config import TrainConfig, override
from dbd_dist.launch.local import run_local
from dbd_dist.runtime.stopping import Stopped
from tune_spaces.attack_settings import of_training
from tune_spaces.metrics import DEFENDER, Metric, mean, with_score

STOP_FILE = "stop"
"""In the sweep's folder: no trial begins another run."""
DYING_S = 60.0
"""How long to wait for a process that still holds a run."""
OF_RESULT = ("clean_acc", "asr", "robust_acc", "kept", "kept_poisoned", "poisoned")


def train(number: int, values: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """A run for each seed."""
    began, results = time.monotonic(), []
    names = run_names(job["name"], number, [int(seed) for seed in job["datas"]])
    for place, (seed, data) in enumerate(job["datas"].items()):
        config = override(TrainConfig.from_dict(job["base"]), of_training(values) | {"seed": int(seed), "data": data})
        results.append(run_one(config, names[int(seed)], job, reports=place == 0))
    means, spread = mean(results)
    folders = [Path(job["storage"]) / name for name in names.values()]
    return {
        "status": "finished",
        "metrics": means,
        "spread": spread,
        "by_seed": dict(zip(job["datas"], results, strict=True)),
        "seconds": round(time.monotonic() - began, 2),
    } | left_by(folders)


def run_names(sweep: str, number: int, seeds: list[int]) -> dict[int, str]:
    """Seed -> name of the run; a trial of one seed is that run."""
    folder = f"{sweep}/trial-{number:04d}"
    return {seed: folder if len(seeds) == 1 else f"{folder}/seed-{seed}" for seed in seeds}


def run_one(config: TrainConfig, name: str, job: Mapping[str, Any], *, reports: bool) -> dict[str, Any]:
    """Train one run, or find it finished; its metrics."""
    storage = Path(job["storage"])
    if (storage / job["name"] / STOP_FILE).exists():
        raise Stopped("the sweep is stopping", exit_code=130)
    metric = Metric(**job["metric"]) if reports and job["asha"] else None
    end = time.monotonic() + DYING_S
    while True:
        try:
            result = _run(config, storage, name, job, metric)
            assert result is not None
            return of_run(storage / name, result)
        except lock.InUse:  # the process of a command that was killed ends some seconds after it
            if time.monotonic() > end:
                raise
            time.sleep(1)


def _run(
    config: TrainConfig, storage: Path, name: str, job: Mapping[str, Any], metric: Metric | None
) -> dict[str, Any] | None:
    if (config.compute.workers or 1) > 1:
        return _on_workers(config, storage, name, job, metric)
    return run_local(
        config, storage=storage, name=name, quiet=True, heeds_file=True, hook=lambda row, _: _report(row, metric)
    )


def of_run(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a finished run: of its result, and the last that a defender measured."""
    seen: dict[str, Any] = {}
    for row in rows_of(folder):
        seen |= {name: row[name] for name in DEFENDER if name in row}
    return with_score({name: result[name] for name in OF_RESULT if result.get(name) is not None} | seen)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ranked_row(row: Mapping[str, Any], metric: Metric) -> dict[str, Any] | None:
    """What the scheduler is told of a row; None where the metric was not measured, and at the last epoch: what is
    finished cannot be stopped."""
    value = metric.signed(with_score(row))
    if value is None or row["epoch"] == row["epochs"]:
        return None
    return {"epoch": row["epoch"], "value": value}


def _report(row: Mapping[str, Any], metric: Metric | None) -> None:
    told = None if metric is None else ranked_row(row, metric)
    if told is not None:
        from ray import tune

        tune.report(told)  # ends this thread where the scheduler stops the trial


def _on_workers(
    config: TrainConfig, storage: Path, name: str, job: Mapping[str, Any], metric: Metric | None
) -> dict[str, Any] | None:
    from ray.tune.integration.ray_train import TuneReportCallback

    from dbd_dist.launch.ray_train import WORKER_ENV, run_ray

    class Ranked(TuneReportCallback):
        """Hands on what the scheduler needs."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            told = None if metric is None else ranked_row(metrics[0], metric)
            if told is not None:
                super().after_report(run_context, [told], None)

    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    return run_ray(
        config, storage=storage, name=name, quiet=True, cpus_per_worker=job["cpus"], callbacks=[Ranked()]
    )  # fmt: skip


def left_by(folders: list[Path]) -> dict[str, Any]:
    """What runs, finished or not, have left: "runs", "stages" (name -> seconds, summed, and whether all reused it) and
    "waited_s"."""
    stages: dict[str, dict[str, Any]] = {}
    waited = 0.0
    for folder in folders:
        for row in rows_of(folder):
            stage = stages.setdefault(row["stage"], {"seconds": 0.0, "reused": True})
            stage["seconds"] = round(stage["seconds"] + row["time_s"], 3)
            stage["reused"] &= bool(row.get("reused"))
        waited += _waited_s(folder / "logs" / "rank0.jsonl")
    return {"runs": [str(folder) for folder in folders], "stages": stages, "waited_s": round(waited, 2)}


def _waited_s(log: Path) -> float:
    try:
        lines = [line for line in log.read_text().splitlines() if '"waited for a stage"' in line]
        return sum(float(json.loads(line)["seconds"]) for line in lines)
    except (OSError, ValueError, KeyError):
        return 0.0


def early(folders: list[Path], metric: Metric) -> tuple[int, dict[str, Any]]:
    """Epoch and metrics of the last row with the metric, of a trial that was stopped early."""
    found: tuple[int, dict[str, Any]] = (0, {})
    for row in rows_of(folders[0]):
        if metric.signed(with_score(row)) is not None:
            names = (*OF_RESULT, *DEFENDER)
            found = (row["epoch"], with_score({name: row[name] for name in names if name in row}))
    return found
