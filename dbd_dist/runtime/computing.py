"""How a process computes: precision, compilation, CUDA graphs, threads."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from dbd_dist.config import ComputeConfig
from dbd_dist.distributed.world import World


def uses_bf16(compute: ComputeConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16: asked for, or left to us and the device has instructions for it."""
    if compute.precision != "auto":
        return compute.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # without them, bfloat16 is several times slower than float32; ATEN_CPU_CAPABILITY can keep torch from using them
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def compiles(compute: ComputeConfig, device: torch.device) -> bool:
    """Whether to compile networks: asked for, or left to us and the device is a GPU with a compiler beside it."""
    if compute.compile != "auto":
        return compute.compile == "on"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


def use_cuda_graphs(compute: ComputeConfig, world: World) -> bool:
    """Whether to replay MixMatch's step as a CUDA graph: one rank, on a GPU, unless switched off."""
    return world.device.type == "cuda" and world.size == 1 and compute.cuda_graphs != "off"


def set_threads(compute: ComputeConfig, world: World) -> None:
    """Give torch its threads: as asked for, or the machine's cores over the ranks on it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    torch.set_num_threads(compute.threads or compute.cpus_per_worker or max(cores // here, 1))
    torch.backends.cudnn.benchmark = True  # on CUDA alone: batches have a handful of shapes
