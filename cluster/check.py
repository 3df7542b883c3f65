"""`dbd doctor`: is this machine, or every node of a cluster, fit to run?"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

import data_prep.errors
from data_prep.errors import UserError

from . import session, topology
from . import storage as storage_module

Status = Literal["ok", "warn", "fail"]
GIB = 1024**3
PYTHONS = ((3, 11), (3, 13))
NODE_TIMEOUT_S = 180  # the first task on a node starts a worker and imports torch there
MUST_AGREE = (
    "python",
    "torch",
    "ray",
)  # between nodes: pickled tensors and Ray's own protocol depend on them


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Is this machine, or every node of the cluster, fit to run? Exits with 0 when it is, with 1 when not."""

    storage: str = "runs"
    """The folder where runs will be kept."""
    cluster: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check every node of the Ray cluster that this machine belongs to."""


def main(argv: Sequence[str] | None = None) -> int:
    options = tyro.cli(Options, args=argv, prog="dbd doctor")
    if options.cluster:
        reports = examine_cluster(options.storage)
    else:
        reports = {"": examine(options.storage)}
    for where, findings in reports.items():
        print(table(findings, title=where))
    failed = {where: [f.name for f in found if f.status == "fail"] for where, found in reports.items()}
    failed = {where: names for where, names in failed.items() if names}
    for where, names in failed.items():
        print(f"Not fit{': ' + where if where else ''} ({', '.join(names)})")
    if not failed:
        print("Fit to run.")
    return 1 if failed else 0


def examine(storage: str) -> list[Finding]:
    """Every check of this machine, in the order of the table. A check that raises is a failed one."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "torch": check_torch,
        "opencv": check_opencv,
        "turbojpeg": check_turbojpeg,
        "ffcv": check_ffcv,
        "ray": check_ray,
        "cpus": check_cpus,
        "gpus": check_gpus,
        "memory": check_memory,
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "disk": partial(check_disk, storage),
        "storage": partial(check_storage, storage),
        "clock": check_clock,
    }
    return [_guarded(name, check) for name, check in checks.items()]


def table(findings: Sequence[Finding], *, title: str = "") -> str:
    width = max(len(finding.name) for finding in findings)
    lines = [title] if title else []
    for finding in findings:
        lines.append(f"  {finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.remedy and finding.status != "ok":
            lines.append(f"{'':{width + 10}}-> {finding.remedy}")
    return "\n".join(lines)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Finding:
    detail = ".".join(map(str, version))
    lowest, highest = PYTHONS
    if lowest <= version[:2] <= highest:
        return Finding("python", "ok", detail)
    allowed = f"{lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}"
    return Finding("python", "fail", f"{detail}; allowed: {allowed}", "make setup PYTHON=python3.12")


def check_torch() -> Finding:
    import torch
    import torchvision

    finding = pair(torch.__version__, torchvision.__version__, importlib.metadata.requires("torchvision") or [])
    if finding.status == "ok":
        import torchvision.ops  # its operators register only against the torch they were built for
    return finding


def pair(torch: str, torchvision: str, requirements: Sequence[str]) -> Finding:
    """Whether a torchvision was built for this torch; they share C++ symbols, so only exactly one will do."""
    detail = f"torch {torch}, torchvision {torchvision}"
    wanted = next((found[1] for r in requirements if (found := re.match(r"torch ?\(?==([\w.]+)", r))), None)
    if wanted is not None and wanted != torch.partition("+")[0]:
        return Finding("torch", "fail", f"{detail}, which wants torch {wanted}", "make setup installs a matching pair")
    return Finding("torch", "ok", detail)


def check_opencv() -> Finding:
    try:
        import cv2
    except ImportError as error:
        return Finding("opencv", "fail", str(error), "install libopencv-dev (it brings the X11 and GL libraries)")
    return Finding("opencv", "ok", cv2.__version__)


def check_turbojpeg() -> Finding:
    try:
        ctypes.CDLL("libturbojpeg.so.0")
    except OSError as error:
        return Finding("turbojpeg", "fail", str(error), "install libturbojpeg0-dev")
    return Finding("turbojpeg", "ok", "libturbojpeg.so.0")


def check_ffcv() -> Finding:
    """FFCV's compiled part loads. FFCV is not imported: that takes seconds and resets torch's threads."""
    version = importlib.metadata.version("ffcv")
    library = next(f for f in importlib.metadata.files("ffcv") or [] if f.name.startswith("_libffcv"))
    try:
        ctypes.CDLL(str(library.locate()))
    except OSError as error:
        return Finding("ffcv", "fail", f"{version}: {error}", "install libopencv-dev and libturbojpeg0-dev")
    if sys.version_info >= (3, 12) and importlib.util.find_spec("setuptools") is None:
        return Finding("ffcv", "fail", f"{version} wants distutils, which Python dropped", "pip install setuptools")
    return Finding("ffcv", "ok", version)


def check_ray() -> Finding:
    import ray

    if importlib.util.find_spec("aiohttp_cors") is None:
        return Finding("ray", "fail", f"{ray.__version__} without its dashboard", "pip install 'ray[default]'")
    return Finding("ray", "ok", ray.__version__)


def check_cpus() -> Finding:
    return Finding("cpus", "ok", f"{topology.this_machine().cpus} of {os.cpu_count()} usable by this process")


def check_gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding("gpus", "ok", "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in found))
    if os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES", "unset") not in ("", "-1"):
        why = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
        return Finding("gpus", "warn", f"there are some, torch ({why}) cannot use them", "update the NVIDIA driver")
    return Finding("gpus", "ok", "none; training runs on the CPU")


def check_memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _at_least("memory", total, fail=2 * GIB, warn=4 * GIB, remedy="use a larger machine")


def check_shared_memory(path: str = "/dev/shm") -> Finding:
    """Ray's objects live there; a container gets 64 MiB by default."""
    if not os.path.isdir(path):
        return Finding("shared memory", "fail", f"no {path}", f"mount a tmpfs there: mount -t tmpfs tmpfs {path}")
    total = shutil.disk_usage(path).total
    return _at_least("shared memory", total, fail=0, warn=2 * GIB, remedy="in Docker: --shm-size=8g")


def check_open_files(limits: tuple[int, int] | None = None) -> Finding:
    """Ray opens a few hundred sockets a worker, and raises the soft limit to the hard one by itself."""
    import resource

    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    status: Status = "ok" if most >= 8192 else "warn" if most >= 1024 else "fail"
    return Finding(
        "open files", status, f"soft {soft}, hard {hard}", "raise the hard limit: ulimit -Hn 65536 (as root)"
    )


def check_disk(storage: str) -> Finding:
    spaces = {tempfile.gettempdir(): shutil.disk_usage(tempfile.gettempdir()).free}  # Ray's logs and spilled objects
    with contextlib.suppress(UserError):  # check_storage reports it
        place = storage_module.resolve(storage)
        spaces[str(place)] = storage_module.free_bytes(place)
    path, free = min(spaces.items(), key=lambda item: item[1])
    remedy = "free some, or choose another --storage"
    return _at_least("disk", free, fail=GIB, warn=10 * GIB, remedy=remedy, of=f" free in {path}")


def check_storage(storage: str) -> Finding:
    place = storage_module.resolve(storage)
    storage_module.check_writable(place)
    kind = storage_module.file_system(place)
    if kind == "tmpfs":
        return Finding("storage", "warn", f"{place} is in memory and gone after a restart", "choose a folder on disk")
    return Finding("storage", "ok", f"{place} can be written ({kind or 'unknown file system'})")


def check_clock(now: float | None = None) -> Finding:
    """A clock before this release makes certificates fail."""
    now = time.time() if now is None else now
    detail = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    return Finding("clock", "ok" if now > 1_767_225_600 else "fail", detail, "set the clock (chrony or ntpd)")  # 2026


def examine_cluster(storage: str) -> dict[str, list[Finding]]:
    """The same checks on every node, by "host (address)", and whether the nodes fit together."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
        evaluator, clock = ray.remote(num_cpus=0)(_examine_node), ray.remote(num_cpus=0)(_now)
        pins = {where: NodeAffinitySchedulingStrategy(node.node_id, soft=False) for where, node in nodes.items()}
        asked = {
            where: evaluator.options(scheduling_strategy=pin).remote(str(place), mark, len(nodes))
            for where, pin in pins.items()
        }
        deadline = time.monotonic() + NODE_TIMEOUT_S
        for where, reference in asked.items():
            try:
                rows = ray.get(reference, timeout=max(1.0, deadline - time.monotonic()))
                start = time.time()
                there = ray.get(clock.options(scheduling_strategy=pins[where]).remote(), timeout=30)
                offset_s = there - (start + time.time()) / 2
            except Exception as error:  # any failure of a node is the finding
                reason = next(iter(str(error).splitlines()), "") or type(error).__name__
                reports[where] = [Finding("node", "fail", reason, "look into Ray's logs on that node")]
                continue
            reports[where] = [Finding(*row) for row in rows] + [clock_offset(offset_s)]
        if mark is not None:
            mark.remove()
    return compare(reports)


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


def _examine_node(storage: str, mark: storage_module.Mark | None, nodes: int) -> list[tuple[str, Status, str, str]]:
    """What runs on a node; plain values, so that what comes back needs no import."""
    findings = examine(storage)
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
        findings.append(_guarded("host name", lambda: check_name(socket.gethostbyname(socket.gethostname()))))
    return [(f.name, f.status, f.detail, f.remedy) for f in findings]


def _now() -> float:
    return time.time()


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except UserError as error:
        return Finding(name, "fail", error.what, error.hint or error.expected or "")
    except Exception as error:  # a broken library raises anything; a preflight reports it
        return Finding(name, "fail", f"{type(error).__name__}: {error}", "make setup")


def _at_least(name: str, found: int, *, fail: int, warn: int, remedy: str, of: str = "") -> Finding:
    status: Status = "fail" if found < fail else "warn" if found < warn else "ok"
    return Finding(name, status, f"{found / GIB:.1f} GiB{of}", remedy)


if __name__ == "__main__":
    sys.exit(main())
