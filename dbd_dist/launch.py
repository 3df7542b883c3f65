"""Starting a run, or the making of an artefact, on Ray Train workers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

from cluster import session, topology
from cluster.errors import ClusterError
from data_prep.errors import UserError
from data_prep.manifest import Dataset
from dbd_dist import pipeline, stopping
from dbd_dist.config import TrainConfig, to_dict
from dbd_dist.craft.job import Job
from dbd_dist.local import prepare_folder
from dbd_dist.progress import Display, Follower
from dbd_dist.runfolder import RunFolder
from dbd_dist.stopping import StopRequest

WORKER_ENV = {
    # the defaults of Ray Train poll once a second and more; short epochs would wait for them
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
ALONE_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a Ray of this machine's own, whose only node nobody takes away; watching costs seconds at the start."""
RAY_FOLDER = "ray"
"""Ray Train's own files, in a run folder while it is under way."""
FAILURES = 3
"""How often workers may be lost before the run ends."""


def run_ray(
    config: TrainConfig,
    *,
    storage: Path,
    name: str,
    quiet: bool = False,
    cpus_per_worker: float | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any] | None:
    """Run on Ray Train workers: on the cluster that this process belongs to, else on a Ray of this machine's own.

    Args:
        callbacks: for Ray Train's RunConfig.
        cpus_per_worker: what to ask of Ray for each worker, where not an equal share of all there is.

    Raises:
        UserError, ClusterError: the run cannot start, or ended for a reason that its user can mend.
    """
    folder, dataset, stages = prepare_folder(config, storage, name)
    done = _finished(folder, config, dataset)
    if done is not None:
        return done
    if session.cluster_address(os.environ) is None:  # both checks before the seconds that Ray takes to start
        here, fewest = topology.this_machine(), config.compute.min_workers
        _share(config.compute.workers, config.compute.device, here, "compute.workers", fewest)
    if config.compute.workers is not None:
        for count in range(config.compute.min_workers or config.compute.workers, config.compute.workers + 1):
            pipeline.check(config, dataset, count)

    _set_environment()
    with session.connect(runtime_env=None):
        from dbd_dist.worker import train_loop

        fewest = config.compute.min_workers
        share = _share(config.compute.workers, config.compute.device, topology.of_ray(), "compute.workers", fewest)
        most = share.workers if fewest is None else config.compute.workers or share.workers
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, workers=most))
        for count in range(fewest or most, most + 1):
            pipeline.check(config, dataset, count)
        folder.claim(config, dataset)
        _on_workers(
            train_loop,
            {
                "config": {**to_dict(config)},
                "data": str(dataset.folder.resolve()),
                "folder": str(folder.path),
                "stages": str(stages),
            },
            share,
            count=most if fewest is None else (fewest, most),
            home=folder.path,
            progress=folder.progress,
            quiet=quiet,
            cpus_per_worker=cpus_per_worker,
            callbacks=callbacks,
        )
    return folder.result()


def _finished(folder: RunFolder, config: TrainConfig, dataset: Dataset) -> dict[str, Any] | None:
    """The result of an earlier run of the same configuration in this folder."""
    if folder.result() is None:
        return None
    folder.claim(config, dataset)
    print(f"{folder.path} is finished; its result stands.", file=sys.stderr)
    return folder.result()


def craft_ray(job: Job, *, workers: int | None, device: Literal["auto", "cpu", "cuda"], quiet: bool = False) -> None:
    """Do the work of an artefact on Ray Train workers; see `run_ray` for where they are.

    Raises:
        UserError, ClusterError: as `run_ray`.
    """
    if session.cluster_address(os.environ) is None:
        job.check(_share(workers, device, topology.this_machine(), "--workers").workers)
    _set_environment()
    with session.connect(runtime_env=None):
        from dbd_dist.worker import craft_loop

        share = _share(workers, device, topology.of_ray(), "--workers")
        job.check(share.workers)
        _on_workers(
            craft_loop, job.to_dict(), share, count=share.workers, home=job.work, progress=job.progress, quiet=quiet
        )


def _set_environment() -> None:
    alone = {} if session.cluster_address(os.environ) else ALONE_ENV
    os.environ.update({k: v for k, v in (WORKER_ENV | alone).items() if k not in os.environ})


def _on_workers(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    share: topology.Share,
    *,
    count: int | tuple[int, int],
    home: Path,
    progress: Path,
    quiet: bool,
    cpus_per_worker: float | None = None,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `loop(arguments)` on workers of a share's size, and wait for all of them.

    SIGINT and SIGTERM are passed on to the workers through a file in `home`; see `stopping`.

    Args:
        loop: leaves an ERROR_FILE in `home` for what its user can mend (see `worker.telling`).
        count: workers; or how many at least and at most.
        progress: the file to show meanwhile.

    Raises:
        UserError: the one that a worker left; Stopped among them.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from dbd_dist.worker import ERROR_FILE

    error_file, request = home / ERROR_FILE, StopRequest(home / stopping.FILE)
    error_file.unlink(missing_ok=True)
    request.clear()
    cpus = share.cpus_per_worker if cpus_per_worker is None else cpus_per_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=count,
            use_gpu=share.use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if share.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=RAY_FOLDER,
            storage_path=str(home),
            failure_config=ray.train.FailureConfig(max_failures=FAILURES),
            callbacks=list(callbacks),
        ),
        torch_config=TorchConfig(backend="nccl" if share.use_gpu else "gloo", timeout_s=600),
    )
    failure: Exception | None = None
    try:
        with nullcontext() if quiet else Follower(progress, Display()), stopping.signals(request.leave):
            _fit(trainer)
    except ray.train.TrainingFailedError as error:
        failure = error
    request.clear()
    shutil.rmtree(home / RAY_FOLDER, ignore_errors=True)
    if error_file.exists():
        fields = json.loads(error_file.read_text())
        error_file.unlink()
        progress.unlink(missing_ok=True)
        if "exit_code" in fields:
            raise stopping.Stopped(
                fields["what"], where=fields["where"], fix=fields["fix"], exit_code=fields["exit_code"]
            )
        raise UserError(
            fields["what"], where=fields["where"], allowed=fields["allowed"], fix=fields["fix"]
        ) from failure
    if failure is not None:
        raise failure


def _fit(trainer: Any) -> None:
    """`trainer.fit()` in a thread of its own, so that signals are ours: in the main thread Ray Train takes Ctrl-C as an
    order to abort."""
    raised: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if raised:
        raise raised[0]


def _share(
    workers: int | None, device: str, machine: topology.Topology, where: str, fewest: int | None = None
) -> topology.Share:
    """The share of `workers`, or of as many as there is room for, down to `fewest`."""
    use_gpu = {"auto": None, "cpu": False, "cuda": True}[device]
    for count in range(workers or 0, fewest or workers or 0, -1):
        with suppress(ClusterError):
            return topology.share(machine, workers=count, use_gpu=use_gpu, where=where)
    return topology.share(machine, workers=fewest or workers, use_gpu=use_gpu, where=where)
