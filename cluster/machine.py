"""The checks of `dbd doctor` on one machine."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from data_prep.errors import UserError

from . import storage as storage_module
from . import topology

Status = Literal["ok", "warn", "fail"]
GIB = 1024**3
PYTHONS = ((3, 11), (3, 13))
SMALLEST_SHM = 128 << 20
"""A container's default of 64 MiB is too small for NCCL between the GPUs of one node, and for Ray's objects."""


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(storage: str) -> list[Finding]:
    """Every check of this machine, in the order of the table. A check that raises is a failed one."""
    checks: dict[str, Callable[[], Finding]] = {
        "python": check_python,
        "libraries": check_libraries,
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
        "interfaces": check_interfaces,
        "clock": check_clock,
    }
    return [guarded(name, check) for name, check in checks.items()]


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
    for wanted in map(Requirement, requirements):
        if wanted.name == "torch" and not wanted.specifier.contains(Version(torch).public, prereleases=True):
            what = f"{detail}, which wants torch {wanted.specifier}"
            return Finding("torch", "fail", what, "make setup installs a matching pair")
    return Finding("torch", "ok", detail)


def check_libraries(requirements: Sequence[str] | None = None) -> Finding:
    """Every package that this project needs is there, in a version that it takes."""
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("dbd-dist") or []
        except importlib.metadata.PackageNotFoundError:
            return Finding("libraries", "ok", "not looked at: this project runs from its folder here")
    wrong = []
    wanted = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, wanted {requirement.specifier}")
    if wrong:
        return Finding("libraries", "fail", "; ".join(wrong), "make setup, or pip install dbd-dist -c constraints.txt")
    return Finding("libraries", "ok", f"all {len(wanted)} that are needed")


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
    remedy = "in Docker: --shm-size=8g; on Kubernetes: an emptyDir with medium: Memory"
    return _at_least("shared memory", total, fail=SMALLEST_SHM, warn=2 * GIB, remedy=remedy)


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


def check_interfaces(environ: Mapping[str, str] = os.environ, present: Sequence[str] | None = None) -> Finding:
    """The network interfaces that gloo and NCCL are told to use are there."""
    present = topology.interfaces() if present is None else present
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        names = environ.get(variable, "").strip()
        if names.startswith("^"):  # NCCL: all but these
            continue
        exact = variable.startswith("GLOO") or names.startswith("=")
        for name in filter(None, names.lstrip("=").split(",")):
            if not any(p == name if exact else p.startswith(name) for p in present):
                others = ", ".join(p for p in present if p != "lo")
                remedy = f"set {variable} to one of: {others}" if others else f"unset {variable}"
                return Finding("interfaces", "fail", f"{variable} names {name}, which is not here", remedy)
    return Finding("interfaces", "ok", ", ".join(present))


def check_clock(now: float | None = None) -> Finding:
    """A clock before this release makes certificates fail."""
    now = time.time() if now is None else now
    detail = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    return Finding("clock", "ok" if now > 1_767_225_600 else "fail", detail, "set the clock (chrony or ntpd)")  # 2026


def guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except UserError as error:
        return Finding(name, "fail", error.what, error.hint or error.expected or "")
    except Exception as error:  # a broken library raises anything; a preflight reports it
        return Finding(name, "fail", f"{type(error).__name__}: {error}", "make setup")


def _at_least(name: str, found: int, *, fail: int, warn: int, remedy: str, of: str = "") -> Finding:
    status: Status = "fail" if found < fail else "warn" if found < warn else "ok"
    return Finding(name, status, f"{found / GIB:.1f} GiB{of}", remedy)
