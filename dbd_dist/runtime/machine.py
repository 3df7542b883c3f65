"""What a run computed on, and with: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dbd_dist.config import TrainConfig
from dbd_dist.distributed.world import World


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("dbd-dist", "torch", "torchvision", "ray", "ffcv", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def commit() -> str | None:
    """The commit of the code, with a "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def host() -> dict[str, Any]:
    """The machine, without its name and that of its kernel's builder, which may say whose it is."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    release = ".".join(platform.release().split(".")[:2])
    libc = " ".join(platform.libc_ver())
    system = f"{platform.system()}-{release}, {platform.machine()}, {libc}".removesuffix(", ")
    return {"system": system, "cpu": cpu, "cores": os.cpu_count(), "gpus": gpus}


def describe(world: World, config: TrainConfig, bf16: bool) -> dict[str, Any]:
    """What a run computed on, for its result."""
    machine = host()
    return {
        "device": machine["gpus"][0] if world.device.type == "cuda" else f"{machine['cpu']}, {machine['cores']} cores",
        "world_size": world.size,
        "precision": "bf16" if bf16 else "fp32",
        "versions": versions(),
        "commit": commit(),
    }
