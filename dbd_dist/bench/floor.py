"""Floors: the work of a step over what the device can do."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from dbd_dist.bench.timing import rounds

# dense, without sparsity: FLOP/s of (bf16 or fp16, fp32) matrix products and bytes/s, from NVIDIA's data sheets;
# fp32 without TF32
DATA_SHEETS: dict[str, tuple[float, float, float]] = {
    "H200": (989e12, 67e12, 4.8e12),
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "A100": (312e12, 19.5e12, 2.0e12),
    "L40S": (362e12, 91.6e12, 0.864e12),
    "L4": (121e12, 30.3e12, 0.3e12),
    "A10": (125e12, 31.2e12, 0.6e12),
    "V100": (125e12, 15.7e12, 0.9e12),
    "T4": (65e12, 8.1e12, 0.32e12),
    "4090": (165e12, 82.6e12, 1.01e12),
}


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in one call, backward passes included; a
    multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


_best: dict[tuple[torch.device, bool, int], float] = {}


def peak_flops(device: torch.device, bf16: bool, threads: int) -> tuple[float, str]:
    """FLOP/s of the device, and where the number comes from: a data sheet for known GPUs, else a large matrix product
    measured here: again at every call, the best of all so far, since a neighbour can halve it for a while."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (low, full, _) in DATA_SHEETS.items():
            if part in name:
                return (low if bf16 else full), f"data sheet of {part}"
    key = (device, bf16, threads)
    _best[key] = max(_best.get(key, 0.0), measured_flops(device, bf16))
    where = f" on {threads} thread(s)" if device.type == "cpu" else ""
    return _best[key], f"best matrix product measured{where}"


def measured_flops(device: torch.device, bf16: bool) -> float:
    """FLOP/s of a square matrix product on random values, the best of thirty."""
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if bf16 else torch.float32
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(device, kind) for i in range(2))
    times = rounds({"product": lambda: a @ b}, repeats=30, device=device, warm_up=3)["product"]
    return 2 * size**3 / min(times)


@functools.cache
def peak_bytes(device: torch.device) -> tuple[float, str]:
    """Bytes/s that memory takes, reading and writing, and where the number comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (_, _, speed) in DATA_SHEETS.items():
            if part in name:
                return speed, f"data sheet of {part}"
    source = torch.ones(1 << 28 if device.type == "cuda" else 1 << 25, device=device)
    target = torch.empty_like(source)
    times = rounds({"copy": lambda: target.copy_(source)}, repeats=10, device=device, warm_up=2)["copy"]
    return 2 * source.nbytes / min(times), "copy measured"
