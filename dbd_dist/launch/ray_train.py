"""Starting a run, or the making of an artefact, on Ray Train workers."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

from cluster import session, topology
from cluster.calls import Call
from cluster.waiting import Waiting
from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.config import ComputeConfig, TrainConfig
from dbd_dist.craft.job import Job
from dbd_dist.launch.failures import RunFailed, run_failed
from dbd_dist.launch.local import prepare_folder
from dbd_dist.runtime import disk as space
from dbd_dist.runtime import runner, stopping, watchdog
from dbd_dist.runtime.bucket.folder import VARIABLE, is_for_one_node
from dbd_dist.runtime.checkpoint import retry_on_oserror
from dbd_dist.runtime.progress import Display, Follower
from dbd_dist.runtime.run_folder import ERROR_FILE, RAY_FOLDER, RunFolder
from dbd_dist.runtime.stopping import StopRequest

WORKER_ENV = {
    # the defaults of Ray Train poll once a second and more; short epochs would wait for them
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
ALONE_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""For a Ray of this machine's own, whose only node is never preempted; watching costs seconds at the start."""
RETRIES = 3
"""How often workers are started again after one has ended."""
POLL_S = 0.3
"""Between polls of whether Ray is still there."""
WORKERS_HEED_S = 3.0
"""How long after a request to stop workers may still come up and heed it."""


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
        cpus_per_worker: what to ask Ray for, for each worker; an equal part of all that there are when left out.

    Raises:
        UserError: the run cannot start, or ended for a reason that its user can mend; `Stopped` on request,
            `StalledError` where its workers hung every time, `RunFailed` for any other reason.
    """
    folder, dataset, stages = prepare_folder(config, storage, name)
    done = _finished(folder, config, dataset)
    if done is not None:
        return done
    if session.cluster_address(os.environ) is None:  # both checks before the seconds that Ray takes to start
        _resources_of_a_run(config.compute, topology.this_machine())
    if config.compute.workers is not None:
        for count in range(config.compute.min_workers or config.compute.workers, config.compute.workers + 1):
            runner.check(config, dataset, count)

    space.check_run(config, dataset, folder.path)
    with lock.held(folder.path / lock.FILE, str(folder.path)):
        known = watchdog.stacks(folder.path)
        failure = _train(config, dataset, folder, stages, name, quiet, cpus_per_worker, callbacks)
    if failure is not None:  # raised only now that Ray has ended: its workers cannot continue the run any more
        retry_on_oserror(folder.check, folder.path, 0)  # one that is gone explains the failure
        stalled = watchdog.stalled(folder.path, known, died=str(failure))
        if stalled is not None:
            raise stalled from _exception(failure)
        raise _failed(failure, folder.path, folder.last_checkpoint())
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
) -> BaseException | str | None:
    _set_environment()
    with session.connect(runtime_env=None):
        from dbd_dist.launch.worker import RetryLog, train_loop

        fewest = config.compute.min_workers
        nodes = topology.selected(topology.from_ray(), config.compute.node_labels)
        if is_for_one_node(folder.path):
            topology.check_alone(nodes, VARIABLE)
        resources = _resources_of_a_run(config.compute, nodes)
        most = resources.workers if fewest is None else config.compute.workers or resources.workers
        if cpus_per_worker is not None:
            resources = dataclasses.replace(resources, cpus_per_worker=cpus_per_worker)
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, workers=most))
        for count in range(fewest or most, most + 1):
            runner.check(config, dataset, count)
        folder.claim(config, dataset)
        folder.hold()
        return _on_workers(
            train_loop,
            {
                "config": config.to_dict(),
                "name": name,
                "data": str(dataset.folder.resolve()),
                "folder": str(folder.path),
                "stages": str(stages),
            },
            resources,
            count=most if fewest is None else (fewest, most),
            stoppable=True,
            home=folder.path,
            name=_name_for_ray(name),
            keep=config.compute.keep_ray_results,
            progress=folder.progress,
            quiet=quiet,
            callbacks=[RetryLog(folder.path, name, RETRIES), *callbacks],
            timeout_s=watchdog.collective_timeout_s(config.compute.stall_s),
            wait_s=config.compute.wait_s,
        )


def _finished(folder: RunFolder, config: TrainConfig, dataset: Dataset) -> dict[str, Any] | None:
    """The result of an earlier run of the same configuration in this folder."""
    if folder.result() is None:
        return None
    folder.claim(config, dataset)
    folder.tidy()
    print(f"{folder.path} is finished; its result stands.", file=sys.stderr)
    return folder.result()


def craft_ray(job: Job, *, workers: int | None, device: Literal["auto", "cpu", "cuda"], quiet: bool = False) -> None:
    """Do the work of an artefact on Ray Train workers; see `run_ray` for where they are.

    Raises:
        UserError, RunFailed: as `run_ray`.
    """
    if session.cluster_address(os.environ) is None:
        here = _worker_resources(workers, device, topology.this_machine(), "--workers")
        job.craft.check_workers(here.workers)
    _set_environment()
    with session.connect(runtime_env=None):
        from dbd_dist.launch.worker import craft_loop

        resources = _worker_resources(workers, device, topology.from_ray(), "--workers")
        job.craft.check_workers(resources.workers)
        failure = _on_workers(
            craft_loop,
            job.to_dict(),
            resources,
            count=resources.workers,
            home=job.work,
            name=_name_for_ray(job.work.name),
            progress=job.progress,
            quiet=quiet,
        )
    if failure is not None:
        raise _failed(failure, job.work, "the last finished part")


def _set_environment() -> None:
    alone = {} if session.cluster_address(os.environ) else ALONE_ENV
    os.environ.update({k: v for k, v in (WORKER_ENV | alone).items() if k not in os.environ})


def _show_on_dashboard() -> None:
    """Let Ray Train tell the dashboard of its runs, where there is one; that takes an actor, which outlives the run."""
    if session.has_dashboard():
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")


def _on_workers(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    resources: topology.WorkerResources,
    *,
    count: int | tuple[int, int],
    stoppable: bool = False,
    home: Path,
    name: str = "work",
    keep: bool = False,
    progress: Path,
    quiet: bool,
    callbacks: Sequence[Any] = (),
    timeout_s: float = watchdog.collective_timeout_s(0),
    wait_s: float | None = None,
) -> BaseException | str | None:
    """Run `loop(arguments)` on workers with these resources, and wait for all of them.

    Args:
        loop: leaves an ERROR_FILE in `home` for what its user can mend (see `worker.forward_user_errors`).
        count: workers; or how many at least and at most.
        stoppable: forward SIGINT and SIGTERM to `loop` through a file in `home` (see `stopping`).
        name: of the run for Ray, its dashboard and `ray.train.Result`.
        keep: leave Ray's own folder of the run in `home`.
        progress: the file to show meanwhile.
        timeout_s: how long a collective waits for the other workers.
        wait_s: how long to wait for free resources; None: for ever.

    Returns:
        What ended them before their end, if something did.

    Raises:
        UserError: the one that a worker left; Stopped among them, also on request while no worker had started;
            StillWaiting.
    """
    from dbd_dist.launch.worker import do_run

    request = StopRequest(home / stopping.FILE)
    request.clear()
    (home / ERROR_FILE).unlink(missing_ok=True)
    shutil.rmtree(home / RAY_FOLDER, ignore_errors=True)  # Ray Train would resume from it; our checkpoints are exact
    _show_on_dashboard()
    scaling, run_config = _scaling_config(resources, count), _run_config(home, name, callbacks)
    trainer = _trainer(loop, arguments, scaling, run_config, timeout_s)
    try:
        shown = nullcontext() if quiet else Follower(progress, Display())
        fewest, running = count if isinstance(count, int) else count[0], functools.partial(do_run, home, name)
        waiting = Waiting(fewest, resources.resources, running, limit_s=wait_s, quiet=quiet)
        with shown, stopping.signals(request.forward) if stoppable else nullcontext():
            failure = _wait_for(trainer.fit, lambda: _begun(waiting, request, home))
    finally:
        request.clear()
        if not keep:
            shutil.rmtree(home / RAY_FOLDER, ignore_errors=True)
    left = _error_of_a_worker(home / ERROR_FILE)
    if failure is not None or left is not None:
        progress.unlink(missing_ok=True)
    if left is not None:
        raise left from _exception(failure)
    return failure


def _trainer(
    loop: Callable[[dict[str, Any]], None], arguments: dict[str, Any], scaling: Any, run_config: Any, timeout_s: float
) -> Any:
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        loop,
        train_loop_config=arguments,
        scaling_config=scaling,
        run_config=run_config,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=int(timeout_s)),
    )


def _begun(waiting: Waiting, request: StopRequest, home: Path) -> None:
    """Between polls: say what the workers wait for, and heed a request to stop that no worker is there to see.

    Raises:
        StillWaiting, Stopped
    """
    reason = request.forwarded
    if waiting.poll() and reason is not None and time.monotonic() - reason[1] > WORKERS_HEED_S:
        what, code = f"stopped while waiting for {waiting.needs} ({reason[0]})", stopping.EXIT_CODES[reason[0]]
        raise stopping.Stopped(what, where=home, hint="the same command waits again", exit_code=code)


def _name_for_ray(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _scaling_config(resources: topology.WorkerResources, count: int | tuple[int, int]) -> Any:
    import ray.train

    return ray.train.ScalingConfig(
        num_workers=count,
        use_gpu=resources.use_gpu,
        resources_per_worker=resources.resources,
        placement_strategy=resources.strategy,
        label_selector=resources.labels or None,
    )


def _run_config(home: Path, name: str, callbacks: Sequence[Any]) -> Any:
    import ray.train

    return ray.train.RunConfig(
        name=name,
        storage_path=str(home / RAY_FOLDER),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        failure_config=ray.train.FailureConfig(max_failures=RETRIES),
        callbacks=list(callbacks),
    )


def _error_of_a_worker(path: Path) -> UserError | None:
    """The error that a worker left for its user; its file is removed."""
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    path.unlink()
    what, where, hint = fields["what"], fields["where"], fields["hint"]
    if "exit_code" in fields:
        return stopping.Stopped(what, where=where, hint=hint, exit_code=fields["exit_code"])
    return UserError(what, where=where, expected=fields["expected"], hint=hint)


def _exception(failure: BaseException | str | None) -> BaseException | None:
    return failure if isinstance(failure, BaseException) else None


def _failed(failure: BaseException | str, where: Path, resumes_from: str | None) -> RunFailed:
    failed = run_failed(failure, where=where, resumes_from=resumes_from, tries=RETRIES + 1)
    failed.__cause__ = _exception(failure)  # --debug shows it
    return failed


def _wait_for(fit: Callable[[], object], between: Callable[[], None] = lambda: None) -> BaseException | str | None:
    """Call `fit` and wait for it while Ray is there.

    Args:
        between: called between polls; what it raises ends the waiting.

    Returns:
        What Ray or its workers ended with, as an exception or in words; None at the end of `fit`.

    Raises:
        Any other exception of `fit`.
    """
    import ray.exceptions
    import ray.train

    watch, call = session.Watch(), Call(fit)
    while call.runs(POLL_S):
        lost = watch.lost()
        if lost is not None and call.runs():
            return lost
        if call.runs():
            between()
    if call.error is not None and not isinstance(call.error, ray.train.TrainingFailedError | ray.exceptions.RayError):
        raise call.error
    return call.error


def _resources_of_a_run(compute: ComputeConfig, machine: topology.Topology) -> topology.WorkerResources:
    """What each of a run's workers gets, and where."""
    workers = 1 if compute.gpus_per_worker < 1 else compute.workers
    size = {"cpus_per_worker": compute.cpus_per_worker, "gpus_per_worker": compute.gpus_per_worker}
    found = _worker_resources(workers, compute.device, machine, "compute.workers", compute.min_workers, size)
    return dataclasses.replace(found, strategy=compute.placement, labels=compute.node_labels)


def _worker_resources(
    workers: int | None,
    device: str,
    machine: topology.Topology,
    where: str,
    fewest: int | None = None,
    size: Mapping[str, Any] | None = None,
) -> topology.WorkerResources:
    """What `workers` workers get, or as many as there is room for, down to `fewest`."""
    use_gpu = {"auto": None, "cpu": False, "cuda": True}[device]

    def give(count: int | None) -> topology.WorkerResources:
        return topology.worker_resources(machine, workers=count, use_gpu=use_gpu, where=where, **(size or {}))

    for count in range(workers or 0, fewest or workers or 0, -1):
        with suppress(UserError):
            return give(count)
    return give(fewest or workers)
