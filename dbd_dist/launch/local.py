"""Running in this process, without Ray: plain Python, or one rank of torchrun."""

from __future__ import annotations

import stat
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.dataset.staging import stage
from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.config import TrainConfig
from dbd_dist.craft import job as crafting
from dbd_dist.distributed.world import World
from dbd_dist.runtime import disk as space
from dbd_dist.runtime import logs, runner, watchdog
from dbd_dist.runtime.machine import versions
from dbd_dist.runtime.progress import Display, Follower
from dbd_dist.runtime.reporter import Hook
from dbd_dist.runtime.run_folder import ERROR_FILE, RAY_FOLDER, RunFolder
from dbd_dist.runtime.stopping import StopRequest, signals

RESERVED = ("datasets", "stages")
"""Folders of a storage that are not runs."""
FILES_OF_RUNS = (
    "checkpoints", "logs", "stalls", "tensorboard", RAY_FOLDER, "stop", ERROR_FILE, "run.json", "metrics.jsonl",
    "result.json", "progress.json", "split.parquet", "ranking.parquet", "features.npz", "model.json",
    "model.safetensors", "backbone.json", "backbone.safetensors",
)  # fmt: skip
"""Names in a run's folder that another run below it cannot have."""


def check_name(name: str) -> None:
    """Refuse names of runs that are not a folder of their own under the storage.

    Raises:
        UserError: the name is empty, absolute, too long, cannot be printed, leads out of the storage, or is that of
            another folder there.
    """
    parts = Path(name).parts
    strange = not name.isprintable() or not name.strip() or len(name) > 255
    hidden = any(part.startswith(".") for part in parts)
    inside = any(part in FILES_OF_RUNS for part in parts[1:])
    if not parts or Path(name).is_absolute() or parts[0] in RESERVED or strange or hidden or inside:
        raise UserError(
            f"{name if len(name) <= 255 else name[:77] + '...'!r} cannot name a run",
            where="--name",
            expected="a folder name, or several with / between them, of at most 255 characters that can be printed, "
            f"not below {' or '.join(RESERVED)}, without a part that begins with a dot or names a file of a run",
        )


def check_place(folder: Path, hint: str) -> None:
    """Refuse a folder that cannot be made, before anything is.

    Raises:
        UserError: a name is too long, or a file or a circle of links is in the folder's place or above it.
    """
    for place in (folder, *folder.parents):
        try:
            is_folder = stat.S_ISDIR(place.stat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot be made ({error.strerror})", where=folder, hint=hint) from error
        if not is_folder:
            raise UserError("is a file, not a folder", where=place, hint=hint)
        return


def prepare_folder(config: TrainConfig, storage: Path, name: str) -> tuple[RunFolder, Dataset, Path]:
    """The run's folder, claimed for this configuration, its data set, and where finished stages are kept."""
    assert config.data is not None
    check_name(name)
    dataset = open_dataset(config.data, verify=config.compute.stage is None)  # the copies are checked
    check_place(storage / name, hint="choose another --name")
    folder = RunFolder((storage / name).resolve())
    return folder, dataset, (storage / "stages").resolve()


def run_local(
    config: TrainConfig,
    *,
    storage: Path,
    name: str,
    quiet: bool = False,
    heeds_file: bool = False,
    hook: Hook = lambda row, checkpoint: None,
) -> dict[str, Any] | None:
    """Run in this process; under torchrun, as one rank of several, whatever `config.compute.workers` says. Needs no
    Ray.

    Args:
        heeds_file: stop also when another process writes a request into the folder (`RunFolder.stop`).
        hook: see `reporter.Hook`.
    """
    limit_s = config.compute.stall_s
    world = World.join(config.compute.device, timedelta(seconds=watchdog.collective_timeout_s(limit_s)))
    try:
        folder, dataset, stages = prepare_folder(config, storage, name)
        runner.check(config, dataset, world.size)
        request = StopRequest(folder.stop, reads_file=heeds_file and world.is_main)
        with ExitStack() as around:
            done = world.broadcast(folder.result() is not None)  # one rank looks, as the file may appear meanwhile
            if world.is_main:
                if not done:
                    space.check_run(config, dataset, folder.path)
                    around.enter_context(lock.held(folder.path / lock.FILE, str(folder.path)))
                folder.claim(config, dataset)
                folder.hold()
                request.clear()
            world.barrier()
            if done:
                if world.is_main:
                    folder.tidy()
                return folder.result()
            around.enter_context(logs.log_to(folder.path, run=name, rank=world.rank))
            around.enter_context(watchdog.watching(folder.path, rank=world.rank, limit_s=limit_s))
            logs.start(world.size, str(world.device), versions())
            if config.compute.stage is not None:
                dataset = stage(dataset.folder, config.compute.stage)
            if not quiet and world.is_main:
                around.enter_context(Follower(folder.progress, Display()))
            around.enter_context(signals(request.set))
            result = runner.run(config, dataset, folder, stages, world, request=request, hook=hook)
            logs.event("finish", stage=None)
            return result
    finally:
        world.leave()


def craft_local(job: crafting.Job, device: Literal["auto", "cpu", "cuda"], *, quiet: bool = False) -> None:
    """Do the work of an artefact in this process; under torchrun, as one rank of several."""
    world = World.join(device)
    try:
        job.craft.check_workers(world.size)
        world.barrier()  # rank 0 has made the work folder
        if quiet or not world.is_main:
            crafting.run(job, world)
            return
        with Follower(job.progress, Display()):
            crafting.run(job, world)
    finally:
        world.leave()
