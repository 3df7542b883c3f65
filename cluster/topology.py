"""What machines there are, and how much of them one run gets."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_prep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Node:
    host: str
    address: str
    cpus: int
    gpus: int
    node_id: str = ""  # Ray's; empty for a machine that Ray does not run on
    labels: dict[str, str] = field(default_factory=dict)


Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True)
class Topology:
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        return f"{_count(len(self.nodes), 'node')}, {_count(self.cpus, 'CPU')}, {_count(self.gpus, 'GPU')}"


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """What one run asks Ray for: num_workers, use_gpu and resources_per_worker of a `ScalingConfig`."""

    workers: int
    cpus_per_worker: float
    use_gpu: bool
    gpus_per_worker: float = 1.0
    strategy: Strategy = "PACK"
    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes to take."""

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus_per_worker)} | ({"GPU": self.gpus_per_worker} if self.use_gpu else {})


def this_machine() -> Topology:
    """What this process may use: its CPU affinity (a container's, Slurm's), its visible GPUs."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Topology((Node(host=socket.gethostname(), address="127.0.0.1", cpus=cpus, gpus=torch.cuda.device_count()),))


def from_ray() -> Topology:
    """The living nodes of the Ray cluster that this process is connected to."""
    import ray

    return from_ray_nodes(ray.nodes())


def from_ray_nodes(nodes: Sequence[dict]) -> Topology:
    """`ray.nodes()` as a topology, sorted by address so that every caller sees one order."""
    found = [
        Node(
            host=node.get("NodeManagerHostname", ""),
            address=node["NodeManagerAddress"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            node_id=node["NodeID"],
            labels=dict(node.get("Labels", {})),
        )
        for node in nodes
        if node["Alive"]
    ]
    return Topology(tuple(sorted(found, key=lambda node: (node.address, node.node_id))))


def check_alone(topology: Topology, variable: str) -> None:
    """Refuse nodes other than the one that this process runs on, for a run that is staged on its disk.

    Args:
        variable: that names another folder.

    Raises:
        UserError
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node.address for node in topology.nodes if node.node_id != here]
    if others:
        raise UserError(
            f"the run is staged on this node's disk, which others do not see ({', '.join(others[:3])})",
            where="--storage",
            hint=f"name a folder that all nodes share with {variable}, or this node alone with --compute.labels",
        )


def current() -> Topology:
    """The Ray cluster when connected to one, else this machine."""
    import ray

    return from_ray() if ray.is_initialized() else this_machine()


def worker_resources(
    topology: Topology,
    *,
    workers: int | None = None,
    cpus_per_worker: int | None = None,
    gpus_per_worker: float = 1.0,
    use_gpu: bool | None = None,
    runs: int = 1,
    where: str = "--workers",
) -> WorkerResources:
    """What each of `runs` equal runs at the same time can get.

    Left out, `workers` is one a GPU, or one a node without GPUs (torch uses a node's cores from one process);
    `use_gpu` is whether there are any; `cpus_per_worker` is the most that lets all workers be placed. No
    worker spans two nodes.

    Raises:
        UserError: it does not fit; names what was asked for, what there is, and what would fit.
    """
    if topology.cpus < 1:
        raise UserError(f"The cluster offers no CPU ({topology})", hint="start a node with --num-cpus above 0")
    if use_gpu is None:
        use_gpu = topology.gpus > 0
    if use_gpu and topology.gpus == 0:
        raise UserError(
            f"A GPU was asked for, and there is none ({topology})", hint="leave out the GPU, or add a GPU node"
        )

    def slots(cpus: int) -> int:  # how many workers of that size the nodes hold
        a_gpu = 1 / gpus_per_worker  # how many workers share one, or less than one where a worker takes several
        rooms = ((node.cpus // cpus, int(node.gpus * a_gpu + 1e-6)) for node in topology.nodes)
        return sum(min(by_cpu, by_gpu) if use_gpu else by_cpu for by_cpu, by_gpu in rooms)

    most = slots(cpus_per_worker or 1) // runs
    if workers is None:
        wanted = (
            int(topology.gpus / max(gpus_per_worker, 1)) if use_gpu else sum(node.cpus > 0 for node in topology.nodes)
        )
        workers = max(1, min(most, wanted // runs))
    if workers < 1 or workers > most:
        each = [f"{_count(cpus_per_worker, 'CPU')}" if cpus_per_worker else "at least 1 CPU"] + [
            _count(gpus_per_worker, "GPU")
        ] * use_gpu
        asked = f"{workers} workers" + (f" for each of {runs} runs" if runs > 1 else "")
        raise UserError(
            f"{asked}, each with {' and '.join(each)}, on {topology}",
            where=where,
            expected=f"1 to {most} workers" if most else "none fits at this size",
            hint="ask for fewer workers or fewer CPUs a worker, or add nodes",
        )
    if cpus_per_worker is None:
        largest = max(node.cpus for node in topology.nodes)
        cpus_per_worker = next(c for c in range(largest, 0, -1) if slots(c) >= workers * runs)
    return WorkerResources(
        workers=workers, cpus_per_worker=cpus_per_worker, use_gpu=use_gpu, gpus_per_worker=gpus_per_worker
    )


def selected(topology: Topology, labels: Mapping[str, str]) -> Topology:
    """The nodes that have these labels.

    Raises:
        UserError: none has them.
    """
    found = tuple(n for n in topology.nodes if all(n.labels.get(k) == v for k, v in labels.items()))
    if labels and not found:
        has = sorted({f"{k}={v}" for n in topology.nodes for k, v in n.labels.items() if not k.startswith("ray.io/")})
        raise UserError(
            f"no node has the label {','.join(f'{k}={v}' for k, v in labels.items())}",
            where="compute.labels",
            expected=", ".join(has) or "labels that `ray start --labels` gave the nodes, of which there are none",
        )
    return Topology(found)


def interfaces() -> list[str]:
    """The names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def interface_env(names: str, *, present: Collection[str] | None = None) -> dict[str, str]:
    """Environment that binds gloo and NCCL to network interfaces, for a run's `runtime_env`.

    Without it gloo listens on the address that the host name resolves to, which is often 127.0.0.1: fine on
    one machine, a failed start across several.

    Args:
        names: one interface, or several with commas.
        present: the interfaces to check against; this machine's when left out.
    """
    present = interfaces() if present is None else present
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in present:
            raise UserError(
                f"There is no network interface {name!r}",
                expected=", ".join(sorted(present)),
            )
    # "=" asks NCCL for the exact name; without it "eth1" also takes eth10.
    return {"GLOO_SOCKET_IFNAME": ",".join(wanted), "NCCL_SOCKET_IFNAME": "=" + ",".join(wanted)}


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
