"""Starting a run on Ray Train workers."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cluster import session, topology
from data_prep.errors import UserError
from data_prep.manifest import Dataset
from dbd_dist import pipeline
from dbd_dist.checkpoint import CHECKPOINTS_KEPT
from dbd_dist.config import TrainConfig, to_dict
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
        _share(config, topology.this_machine())
    if config.compute.workers is not None:
        pipeline.check(config, dataset, config.compute.workers)

    os.environ.update({k: v for k, v in WORKER_ENV.items() if k not in os.environ})
    with session.connect(runtime_env=None):
        import ray
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        from dbd_dist.worker import ERROR_FILE, train_loop

        share = _share(config, topology.of_ray())
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, workers=share.workers))
        pipeline.check(config, dataset, share.workers)
        folder.claim(config, dataset)
        error_file = folder.path / ERROR_FILE
        error_file.unlink(missing_ok=True)
        cpus = share.cpus_per_worker if cpus_per_worker is None else cpus_per_worker
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "config": {**to_dict(config)},
                "data": str(dataset.folder.resolve()),
                "folder": str(folder.path),
                "stages": str(stages),
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=share.workers,
                use_gpu=share.use_gpu,
                resources_per_worker={"CPU": cpus} | ({"GPU": 1} if share.use_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name=folder.checkpoints.name,
                storage_path=str(folder.path),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
                failure_config=ray.train.FailureConfig(max_failures=3),
                callbacks=list(callbacks),
            ),
            torch_config=TorchConfig(backend="nccl" if share.use_gpu else "gloo", timeout_s=600),
        )
        failure: Exception | None = None
        try:
            with nullcontext() if quiet else Follower(folder.progress, Display()):
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
        if error_file.exists():
            fields = json.loads(error_file.read_text())
            error_file.unlink()
            folder.progress.unlink(missing_ok=True)
            raise UserError(
                fields["what"], where=fields["where"], allowed=fields["allowed"], fix=fields["fix"]
            ) from failure
        if failure is not None:
            raise failure
    return folder.result()


def _finished(folder: RunFolder, config: TrainConfig, dataset: Dataset) -> dict[str, Any] | None:
    """The result of an earlier run of the same configuration in this folder."""
    if folder.result() is None:
        return None
    folder.claim(config, dataset)
    print(f"{folder.path} is finished; its result stands.", file=sys.stderr)
    return folder.result()


def _share(config: TrainConfig, machine: topology.Topology) -> topology.Share:
    use_gpu = {"auto": None, "cpu": False, "cuda": True}[config.compute.device]
    return topology.share(machine, workers=config.compute.workers, use_gpu=use_gpu, where="compute.workers")
