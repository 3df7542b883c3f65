"""The functions that Ray Train calls in every worker."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch

from data_prep.dataset.staging import open_here
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig
from dbd_dist.craft import job as crafting
from dbd_dist.distributed.world import World
from dbd_dist.runtime import logs, runner, watchdog
from dbd_dist.runtime.run_folder import ERROR_FILE, RunFolder, versions, write_json
from dbd_dist.runtime.stopping import Stopped, StopRequest


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
        runner.run(config, dataset, folder, stages, world, request=request, hook=_report)
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
    with forward_user_errors(job.work):
        crafting.run(job, world)


def _report(row: dict[str, Any], checkpoint: Path | None) -> None:
    ray.train.report(row)


def _preemption() -> str | None:
    """Whether Ray says that a node of this run is about to be taken away; all ranks ask together."""
    if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":
        return None
    return None if ray.train.get_preemption_info() is None else "state"


class RetryLog(ray.train.UserCallback):
    """Notes in the run's logs/driver.jsonl when workers fail, before Ray Train starts them again or gives up."""

    def __init__(self, folder: Path, run: str):
        self._folder, self._run = folder, run

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


@contextmanager
def forward_user_errors(folder: Path) -> Iterator[None]:
    """Leave a UserError of the body as ERROR_FILE in `folder`, for the driver. A run that stopped on request ends
    without an error here."""
    try:
        yield
    except UserError as error:
        # the exception itself reaches the driver only as text inside Ray's own
        fields = {"what": error.what, "where": error.where, "expected": error.expected, "hint": error.hint}
        told = {k: None if v is None else str(v) for k, v in fields.items()}
        if isinstance(error, Stopped):
            write_json(folder / ERROR_FILE, told | {"exit_code": error.exit_code})
            return
        write_json(folder / ERROR_FILE, told)
        raise  # ends the other ranks too, which may be waiting for this one
