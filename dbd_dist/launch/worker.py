"""The functions that Ray Train calls in every worker."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from cluster.gauges import Gauges
from data_prep.dataset.staging import open_here
from data_prep.errors import UserError
from data_prep.io.json import write_json
from dbd_dist.config import TrainConfig
from dbd_dist.craft import job as crafting
from dbd_dist.distributed.world import World
from dbd_dist.launch.failures import of_workers
from dbd_dist.runtime import logs, runner, watchdog
from dbd_dist.runtime.checkpoint import retry_on_oserror, stored_sha256
from dbd_dist.runtime.machine import versions
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.reporter import Hook
from dbd_dist.runtime.run_folder import ERROR_FILE, RAY_FOLDER, RUN_FILE, STARTED_FILE, RunFolder
from dbd_dist.runtime.stopping import Stopped, StopRequest
from dbd_dist.tracking import RunInfo, Tracker

POINTER_FILE = "checkpoint.json"
"""In a checkpoint of Ray's: "uri" and "sha256" of the newest checkpoint of ours that was written then; "stage" and
"epoch" of the report that it came with, which at the end of a stage are also that checkpoint's."""


def train_loop(arguments: dict[str, Any]) -> None:
    """Run one configuration in this worker.

    Args:
        arguments: plain values: "config" (see `TrainConfig.to_dict`), "name" of the run, "data", "folder" and "stages"
            (absolute paths on storage that all nodes share).
    """
    # Ray leaves OMP_NUM_THREADS at the worker's CPUs; the run sets torch's threads itself
    os.environ.pop("OMP_NUM_THREADS", None)
    world = World.current(ray.train.torch.get_device())
    folder = RunFolder(Path(arguments["folder"]))
    if (folder.path / ERROR_FILE).exists():
        return  # a worker gave up for a reason that no restart mends; the driver says which
    if not (folder.path / RUN_FILE).exists():  # the driver has made it
        raise UserError("the run's folder is gone", where=folder.path)
    _note_start(folder.path)
    config = TrainConfig.from_dict(arguments["config"])
    with (
        forward_user_errors(folder.path),
        logs.log_to(folder.path, run=arguments["name"], rank=world.rank),
        watchdog.watching(folder.path, rank=world.rank, limit_s=config.compute.stall_s),
    ):
        logs.start(world.size, str(world.device), versions())
        dataset = open_here(Path(arguments["data"]), config.compute.stage)
        request = StopRequest(folder.stop, reads_file=world.is_main, notice=_preemption)
        stages = Path(arguments["stages"])
        hook, gauges = _reporter(config, folder), RayGauges(arguments["name"], folder.path)
        runner.run(config, dataset, folder, stages, world, request=request, hook=hook, trackers=[gauges])
        logs.event("finish", stage=None)


def craft_loop(arguments: dict[str, Any]) -> None:
    """Do this worker's part of an artefact.

    Args:
        arguments: plain values, as `Job.to_dict` gives them; paths on storage that all nodes share.
    """
    world = World.current(ray.train.torch.get_device())
    job = crafting.Job.from_dict(arguments)
    if (job.work / ERROR_FILE).exists():
        return
    _note_start(job.work)
    with forward_user_errors(job.work):
        crafting.run(job, world)


def _note_start(home: Path) -> None:
    """Tell the driver, which says meanwhile what it waits for."""
    folder = home / RAY_FOLDER / ray.train.get_context().get_experiment_name()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STARTED_FILE).touch()


def do_run(home: Path, name: str) -> bool:
    """Whether workers of a run have said that they run, and have not been lost since (`RetryLog`), for the driver. A
    folder that is gone is theirs to find out."""
    return (home / RAY_FOLDER / name / STARTED_FILE).exists() or not home.exists()


def _reporter(config: TrainConfig, folder: RunFolder) -> Hook:
    """Hands every row to Ray Train, with a pointer to the newest checkpoint: through it Ray's dashboard, Tune and
    `ray.train.Result` see the run. Nothing is read back from it here."""
    results = folder.path / RAY_FOLDER / ray.train.get_context().get_experiment_name()

    def report(row: dict[str, Any], checkpoint: Path | None) -> None:
        if checkpoint is None or not config.compute.keep_ray_results:
            ray.train.report(row)
            return
        pointer = {"uri": checkpoint.resolve().as_uri(), "sha256": stored_sha256(checkpoint)}
        pointer |= {"stage": row["stage"], "epoch": row["epoch"]}
        # a new name each time: Ray removes old ones, and an epoch may be trained again after a failure
        place = results / f"{row['stage']}-{row['epoch']}-{uuid.uuid4().hex[:8]}"
        retry_on_oserror(lambda: _write_pointer(folder, place, pointer), place, config.compute.patience_s)
        there = ray.train.CheckpointUploadMode.NO_UPLOAD
        ray.train.report(row, checkpoint=ray.train.Checkpoint(place), checkpoint_upload_mode=there)

    return report


def _write_pointer(folder: RunFolder, place: Path, pointer: dict[str, Any]) -> None:
    folder.check()
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / POINTER_FILE, pointer)


def _preemption() -> str | None:
    """Whether Ray says that a node of this run will be preempted; all ranks ask together."""
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return None
    return None if ray.train.get_preemption_info() is None else "state"


class RayGauges(Tracker):
    """Ray's own metrics; where Ray exports none, these go nowhere."""

    name = "ray"

    def __init__(self, name: str, folder: Path):
        super().__init__(RunInfo(name=name, folder=folder, config={}))
        self._gauges = Gauges(name)

    def log(self, row: Mapping[str, Any]) -> None:
        self._gauges.set(row)


class RetryLog(ray.train.UserCallback):
    """Logs failures of workers to the run's logs/driver.jsonl, before Ray Train starts them again or gives up; where it
    starts them again, the command says so, and what they then wait for.

    Args:
        retries: how often workers are started again.
    """

    def __init__(self, folder: Path, run: str, retries: int):
        self._folder, self._run = folder, run
        self._failures, self._retries = 0, retries

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        with logs.log_to(self._folder, run=self._run, rank="driver"):
            for rank, error in worker_exceptions.items():
                logs.event(
                    "retry",
                    level=logging.WARNING,
                    failed_rank=rank,
                    type=type(error).__name__,
                    message=str(error)[:4000],
                )
        self._failures += 1
        if self._failures > self._retries or (self._folder / ERROR_FILE).exists():
            return  # the command ends with its own message
        with suppress(OSError):  # what `_note_start` has left
            for started in (self._folder / RAY_FOLDER).glob(f"*/{STARTED_FILE}"):
                started.unlink(missing_ok=True)
        folder = RunFolder(self._folder)
        since = f" from {position}" if (position := folder.last_checkpoint()) else ""
        again = f"the workers are started again{since} (restart {self._failures} of {self._retries})"
        ProgressFile(folder.progress, check=folder.check).say("", f"{of_workers(worker_exceptions)}; {again}")


@contextmanager
def forward_user_errors(folder: Path) -> Iterator[None]:
    """Leave a UserError of the body as ERROR_FILE in `folder`, for the driver. A run that stopped on request ends
    without an error here."""
    try:
        yield
    except UserError as error:
        # the exception itself reaches the driver only as text inside Ray's own
        fields = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
        content = {k: None if v is None else str(v) for k, v in fields.items()}
        if isinstance(error, Stopped):
            write_json(folder / ERROR_FILE, content | {"exit_code": error.exit_code})
            return
        with suppress(OSError):  # a folder that is gone is what the driver finds out by itself
            write_json(folder / ERROR_FILE, content)
        raise  # ends the other ranks too, which may be waiting for this one
