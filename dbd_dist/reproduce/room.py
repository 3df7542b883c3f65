"""How many runs a Ray cluster has room for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster import session, topology
from data_prep.errors import UserError
from dbd_dist.launch.start import ray_train
from dbd_dist.reproduce.grid import Place, Plan


@contextmanager
def ray_place(whole: Plan, jobs: int | None) -> Iterator[tuple[Place, int]]:
    """Connected to Ray, the place for runs there, and how many fit at a time; every process that starts inside joins
    the same Ray.

    Args:
        jobs: how many are wanted; as many as fit where left out.

    Raises:
        UserError: not even one fits, or not as many as are wanted.
    """
    ray_train()  # says so where Ray is not installed
    with session.connect() as joined:
        machine = topology.from_ray()
        computes = {(cell.config.compute.workers, cell.config.compute.device) for cell in whole.cells}
        wanted = jobs or next((count for count in range(len(whole.cells), 1, -1) if _fits(machine, computes, count)), 1)
        given = [_resources(machine, workers, device, wanted) for workers, device in computes]
        place = dataclasses.replace(whole.place, cpus_per_worker=min(one.cpus_per_worker for one in given))
        before = os.environ.get("RAY_ADDRESS")
        if not joined:
            os.environ["RAY_ADDRESS"] = session.joinable_address()
        try:
            yield place, wanted
        finally:
            if before is None:
                os.environ.pop("RAY_ADDRESS", None)
            else:
                os.environ["RAY_ADDRESS"] = before


def _fits(machine: topology.Topology, computes: set[tuple[int | None, str]], runs: int) -> bool:
    try:
        return all(_resources(machine, workers, device, runs) is not None for workers, device in computes)
    except UserError:
        return False


def _resources(machine: topology.Topology, workers: int | None, device: str, runs: int) -> topology.WorkerResources:
    use_gpu = {"auto": None, "cpu": False, "cuda": True}[device]
    return topology.worker_resources(machine, workers=workers, use_gpu=use_gpu, runs=runs, where="--jobs")
