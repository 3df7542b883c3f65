"""`dbd doctor`: is this machine, or every node of a cluster, fit to run?"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

import data_prep.errors
from data_prep.errors import UserError

from . import machine, ports, session, topology
from . import storage as storage_module
from .machine import Finding, Status, examine

NODE_TIMEOUT_S = 180  # the first task on a node starts a worker and imports torch there
MUST_AGREE = (
    "python",
    "torch",
    "ray",
)  # between nodes: pickled tensors and Ray's own protocol depend on them


@dataclass(frozen=True, kw_only=True)
class Options:
    """Is this machine, or every node of the cluster, fit to run? Exits with 0 when it is, with 1 when not."""

    storage: str = "runs"
    """The folder where runs will be kept."""
    cluster: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check every node of the Ray cluster that this machine belongs to."""
    gpus: int = 0
    """How many GPUs there have to be, on all nodes together with --cluster."""


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, prog="dbd doctor")
    if options.cluster:
        reports = examine_cluster(options.storage, gpus=options.gpus)
    else:
        here = topology.this_machine().gpus
        reports = {"": [*examine(options.storage), *enough_gpus(here, options.gpus)]}
    for where, findings in reports.items():
        print(table(findings, title=where))
    failed = {where: [f.name for f in found if f.status == "fail"] for where, found in reports.items()}
    failed = {where: names for where, names in failed.items() if names}
    for where, names in failed.items():
        print(f"Not fit{': ' + where if where else ''} ({', '.join(names)})")
    if not failed:
        print("Fit to run.")
    return 1 if failed else 0


def table(findings: Sequence[Finding], *, title: str = "") -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [title] if title else []
    for finding in findings:
        lines.append(f"  {finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy and finding.status != "ok":
            lines.append(f"{'':{width + 10}}-> {finding.remedy}")
    return "\n".join(lines)


def enough_gpus(found: int, wanted: int) -> list[Finding]:
    """Whether there are as many as somebody wants; nothing where nobody wants any."""
    if wanted == 0:
        return []
    status: Status = "ok" if found >= wanted else "fail"
    remedy = "start Ray with --num-gpus on nodes whose GPUs it does not see, add nodes, or ask for fewer"
    return [Finding("enough gpus", status, f"{found} of {wanted} that are wanted", remedy)]


def examine_cluster(storage: str, *, gpus: int = 0) -> dict[str, list[Finding]]:
    """The same checks on every node, by "host (address)", and whether the nodes fit together."""
    import ray

    if not ray.is_initialized() and session.cluster_address(os.environ) is None:
        raise UserError(
            "There is no Ray cluster here",
            hint="run this on its head node, as a job, or with RAY_ADDRESS=HOST:PORT",
        )
    place = storage_module.resolve(storage)
    reports: dict[str, list[Finding]] = {}
    # The nodes may have another version of this package, or none: what runs there is what is here.
    with session.connect(
        runtime_env={"py_modules": [os.path.dirname(__file__), os.path.dirname(data_prep.errors.__file__)]}
    ):
        nodes: dict[str, topology.Node] = {}
        for node in topology.from_ray().nodes:
            where = f"{node.host} ({node.address})"  # several nodes on one machine share it
            nodes[where if where not in nodes else f"{where} {node.node_id[:8]}"] = node
        try:
            mark = storage_module.leave_mark(place)
        except UserError:
            mark = None  # every node's own storage check reports it
        try:
            _ask_all(nodes, str(place), mark, reports)
        finally:
            if mark is not None:
                mark.remove()
        total = enough_gpus(sum(node.gpus for node in nodes.values()), gpus)
    return compare(reports) | ({"all nodes together": total} if total else {})


def _ask_all(
    nodes: Mapping[str, topology.Node],
    place: str,
    mark: storage_module.Mark | None,
    reports: dict[str, list[Finding]],
) -> None:
    """Run the checks on all nodes at the same time, and then whether they reach each other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def on(where: str, what: Any) -> Any:
        pin = NodeAffinitySchedulingStrategy(nodes[where].node_id, soft=False)
        return ray.remote(num_cpus=0)(what).options(scheduling_strategy=pin)

    asked = {w: on(w, _examine_node).remote(place, mark, len(nodes), node.gpus) for w, node in nodes.items()}
    listeners = {w: on(w, ports.Listener).remote() for w in nodes} if len(nodes) > 1 else {}
    deadline = time.monotonic() + NODE_TIMEOUT_S
    listening: list[ports.Place] = []
    for where, reference in asked.items():
        try:
            rows = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
            start = time.time()
            there: Any = ray.get(on(where, _now).remote(), timeout=30)
            offset_s = there - (start + time.time()) / 2
            if where in listeners:
                listening.append((where, nodes[where].address, ray.get(listeners[where].port.remote(), timeout=30)))
        except Exception as error:  # any failure of a node is the finding
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            reports[where] = [Finding("node", "fail", reason, "look into Ray's logs on that node")]
            continue
        reports[where] = [Finding(*row) for row in rows] + [clock_offset(offset_s)]
    reached = {w: on(w, ports.reach).remote([p for p in listening if p[0] != w]) for w, *_ in listening}
    for where, reference in reached.items():
        reports[where].append(Finding(*ray.get(reference, timeout=60)))


def clock_offset(offset_s: float) -> Finding:
    status: Status = "ok" if abs(offset_s) < 2 else "warn" if abs(offset_s) < 30 else "fail"
    return Finding("clock offset", status, f"{offset_s:+.1f} s from here", "set the clocks (chrony or ntpd)")


def check_name(address: str, environ: Mapping[str, str] = os.environ) -> Finding:
    """Gloo listens on the address that the host name has; on the loopback no other node reaches it."""
    if "GLOO_SOCKET_IFNAME" in environ or not address.startswith("127."):
        return Finding("host name", "ok", address)
    others = ", ".join(name for name in topology.interfaces() if name != "lo")
    remedy = f"set GLOO_SOCKET_IFNAME on every node, here one of: {others}"
    return Finding("host name", "warn", f"{socket.gethostname()} is {address}: gloo fails across nodes", remedy)


def compare(reports: dict[str, list[Finding]]) -> dict[str, list[Finding]]:
    """Turn findings that differ from most nodes' into failures, where nodes must agree."""
    compared = {where: list(findings) for where, findings in reports.items()}
    for name in MUST_AGREE:
        details = {where: f.detail for where, found in reports.items() for f in found if f.name == name}
        usual = max(details.values(), key=list(details.values()).count, default="")
        for where, detail in details.items():
            if detail != usual:
                differs = Finding(name, "fail", f"{detail}; other nodes: {usual}", "install one version everywhere")
                compared[where] = [differs if f.name == name else f for f in compared[where]]
    return compared


def check_gpus_of_ray(rays: int, usable: int) -> Finding:
    """Ray gives a worker a GPU that torch can use there."""
    detail = f"Ray offers {rays}, torch can use {usable}"
    remedy = "see the row gpus; or start Ray there with --num-gpus as many as work"
    return Finding("gpus of ray", "ok" if usable >= rays else "fail", detail, remedy)


def _examine_node(
    storage: str, mark: storage_module.Mark | None, nodes: int, gpus: int
) -> list[tuple[str, Status, str, str]]:
    """What runs on a node; plain values, so that what comes back needs no import."""
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # a task without a GPU sees none
    findings = examine(storage)
    findings.append(machine.guarded("gpus of ray", lambda: check_gpus_of_ray(gpus, topology.this_machine().gpus)))
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    if mark is not None and not mark.seen():
        findings.append(
            Finding(
                "shared storage",
                "fail",
                f"{storage} is not the same here",
                "keep runs on a share that all machines mount",
            )
        )
    if nodes > 1:
        findings.append(machine.guarded("host name", lambda: check_name(socket.gethostbyname(socket.gethostname()))))
    return [(f.name, f.status, f.detail, f.remedy) for f in findings]


def _now() -> float:
    return time.time()


if __name__ == "__main__":
    sys.exit(main())
