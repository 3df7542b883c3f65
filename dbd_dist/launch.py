"""Starting a run, or the making of an artefact, on Ray Train workers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from cluster import session, topology
from data_prep.errors import UserError
from data_prep.manifest import Dataset
from dbd_dist import lock, pipeline, space, watchdog
from dbd_dist.checkpoint import CHECKPOINTS_KEPT
from dbd_dist.config import TrainConfig, to_dict
from dbd_dist.craft.job import Job
from dbd_dist.local import prepare_folder
from dbd_dist.progress import Display, Follower
from dbd_dist.runfolder import RunFolder

WORKER_ENV = {
    # the defaults of Ray Train poll once a second and more; short epochs would wait for them
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


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
        _share(config.compute.workers, config.compute.device, topology.this_machine(), "compute.workers")
    if config.compute.workers is not None:
        pipeline.check(config, dataset, config.compute.workers)

    space.check_run(config, dataset, folder.path)
    with lock.held(folder.path / lock.FILE, str(folder.path)):
        _train(config, dataset, folder, stages, name, quiet, cpus_per_worker, callbacks)
    return folder.result()


def _train(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    stages: Path,
    name: str,
    quiet: bool,
    cpus_per_worker: float | None,
    callbacks: Sequence[Any],
) -> None:
    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    with session.connect(runtime_env=None):
        from dbd_dist.worker import RetryLog, train_loop

        share = _share(config.compute.workers, config.compute.device, topology.of_ray(), "compute.workers")
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, workers=share.workers))
        pipeline.check(config, dataset, share.workers)
        folder.claim(config, dataset)
        known = watchdog.stacks(folder.path)
        try:
            _on_workers(
                train_loop,
                {
                    "config": {**to_dict(config)},
                    "name": name,
                    "data": str(dataset.folder.resolve()),
                    "folder": str(folder.path),
                    "stages": str(stages),
                },
                share,
                home=folder.path,
                name=folder.checkpoints.name,
                progress=folder.progress,
                quiet=quiet,
                cpus_per_worker=cpus_per_worker,
                callbacks=[RetryLog(folder.path, name), *callbacks],
                timeout_s=watchdog.collective_timeout_s(config.compute.stall_s),
            )
        except UserError:
            raise
        except Exception as failure:
            stalled = watchdog.stalled(folder.path, known, died=str(failure))
            if stalled is None:
                raise
            raise stalled from failure


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
    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    with session.connect(runtime_env=None):
        from dbd_dist.worker import craft_loop

        share = _share(workers, device, topology.of_ray(), "--workers")
        job.check(share.workers)
        _on_workers(craft_loop, job.to_dict(), share, home=job.work, name="ray", progress=job.progress, quiet=quiet)


def _on_workers(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    share: topology.Share,
    *,
    home: Path,
    name: str,
    progress: Path,
    quiet: bool,
    cpus_per_worker: float | None = None,
    callbacks: Sequence[Any] = (),
    timeout_s: float = watchdog.collective_timeout_s(0),
) -> None:
    """Run `loop(arguments)` on every worker of a share, and wait for all of them.

    Args:
        loop: leaves an ERROR_FILE in `home` for what its user can mend (see `worker.telling`).
        name: of Ray Train's own folder in `home`.
        progress: the file to show meanwhile.
        timeout_s: how long a collective waits for the other workers.

    Raises:
        UserError: the one that a worker left.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from dbd_dist.worker import ERROR_FILE

    error_file = home / ERROR_FILE
    error_file.unlink(missing_ok=True)
    cpus = share.cpus_per_worker if cpus_per_worker is None else cpus_per_worker
    trainer = TorchTrainer(
        loop,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=share.workers,
            use_gpu=share.use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if share.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(home),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            failure_config=ray.train.FailureConfig(max_failures=3),
            callbacks=list(callbacks),
        ),
        torch_config=TorchConfig(backend="nccl" if share.use_gpu else "gloo", timeout_s=int(timeout_s)),
    )
    failure: Exception | None = None
    try:
        with nullcontext() if quiet else Follower(progress, Display()):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        failure = error
    if error_file.exists():
        fields = json.loads(error_file.read_text())
        error_file.unlink()
        progress.unlink(missing_ok=True)
        raise UserError(
            fields["what"], where=fields["where"], allowed=fields["allowed"], fix=fields["fix"]
        ) from failure
    if failure is not None:
        raise failure


def _share(workers: int | None, device: str, machine: topology.Topology, where: str) -> topology.Share:
    use_gpu = {"auto": None, "cpu": False, "cuda": True}[device]
    return topology.share(machine, workers=workers, use_gpu=use_gpu, where=where)
