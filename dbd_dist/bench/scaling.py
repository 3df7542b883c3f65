"""Pretraining of ResNet-18 over 1, 2 and 4 processes (gloo), each with a core and a thread of its own.

One group of processes runs all variants in turn, so that what disturbs the machine disturbs each of them: the first
process alone, all of them without a word to each other, and all of them as one world. Every process is a rank as
`torchrun` would start it, pinned to a core.

- weak scaling: images per second of the world over those of the process alone, at the same batch a process
- strong scaling: the same at the same global batch
- ceiling: the independent processes over one of them alone. What is missing there, the machine takes (memory bandwidth,
  clock, a hypervisor), not communication: no way to train in parallel gets beyond it.

More processes than cores share these; their efficiency is in terms of cores.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from data_prep.errors import UserError
from dbd_dist.bench.row import Row, Setup
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.distributed.world import World
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import ContrastiveModel
from dbd_dist.stages import SimCLR, simclr
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop

SMALL = ModelConfig(depths=(1, 1), widths=(8, 16))
LIMIT_S = 1800.0


def measure(setup: Setup) -> Iterator[Row]:
    precision = setup.precision if setup.device.type == "cpu" else "fp32"
    cores = len(own_cores())
    title = f"SimCLR, {'small network' if setup.quick else 'ResNet-18'}, {precision}"
    # gradients and synchronised statistics cost the same at any batch: the larger it is, the less they count
    for size, batch in ((2, 8), (4, 8)) if setup.quick else ((2, 32), (2, 64), (4, 32)):
        steps = 1 if setup.quick else 2
        seconds = launch(size, batch, steps, setup.repeats, quick=setup.quick, bf16=precision == "bf16")
        images = {name: steps * batch * (1 if name == "alone" else size) for name in seconds}  # of one pass
        rates = {name: [images[name] / t for t in times] for name, times in seconds.items()}
        for name, text in (
            ("alone", f"1 process, batch {batch}"),
            ("alone, global batch", f"1 process, batch {batch * size}"),
            ("apart", f"{size} processes apart, batch {batch} each"),
            ("together", f"world of {size}, batch {batch} each"),
            ("together, own statistics", f"world of {size}, batch {batch} each, no sync_bn"),
        ):
            yield Row(
                bench="scaling", name=f"{title}, {text}", unit="images/s", values=rates[name], notes={"cores": cores}
            )
        ideal = min(size, cores)
        for text, name, reference, factor in (
            ("weak scaling", "together", "alone", ideal),
            ("strong scaling", "together", "alone, global batch", ideal),
            ("weak scaling, no sync_bn", "together, own statistics", "alone", ideal),
            ("ceiling (apart)", "apart", "alone", ideal),
            ("weak scaling over ceiling", "together", "apart", 1),
        ):
            values = [a / b / factor for a, b in zip(rates[name], rates[reference], strict=True)]
            what = f"{text}, {size} processes on {ideal} cores, batch {batch} each"
            yield Row(bench="scaling", name=what, unit="of ideal", values=values)


def own_cores() -> list[int]:
    """The logical cores that this process may use, one of each physical core, in order."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    chosen: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        chosen.setdefault(siblings.read_text() if siblings.exists() else str(core), core)
    return list(chosen.values())


def launch(size: int, batch: int, steps: int, repeats: int, *, quick: bool, bf16: bool) -> dict[str, list[float]]:
    """Seconds of every repeat of each variant, until the last of `size` processes was done with it.

    Raises:
        UserError: one of them ended with an error, or all took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = own_cores()
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "seconds.json", Path(folder) / "log"
        try:
            for rank in range(size):
                environ = {
                    **os.environ,
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                }  # fmt: skip
                arguments = json.dumps([str(out), cores[rank % len(cores)], batch, steps, repeats, quick, bf16])
                command = [sys.executable, "-m", "dbd_dist.bench.scaling", arguments]
                with log.open("a") as file:
                    processes.append(subprocess.Popen(command, env=environ, stdout=file, stderr=file))
            _wait(processes, log)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return json.loads(out.read_text())


def _wait(processes: list[subprocess.Popen], log: Path) -> None:
    """Until all are done; the first error ends it, since the others would wait for that process."""
    until = time.monotonic() + LIMIT_S
    while any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes) or time.monotonic() > until:
            break
        time.sleep(0.5)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise UserError(f"ranks ended with {codes}: {last}", where="bench scaling")


def rank(out: str, core: int, batch: int, steps: int, repeats: int, quick: bool, bf16: bool) -> None:
    """What one of the processes runs."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})  # before gloo's threads are there, which inherit it
    torch.set_num_threads(1)
    world = World.join("cpu")
    network = SMALL if quick else ModelConfig()
    one = World(device=world.device)
    whole = batch * world.size
    variants: dict[str, Callable[[int], None] | None] = {
        "alone": None if world.rank else trainer(network, one, batch, steps, bf16=bf16),
        "alone, global batch": None if world.rank else trainer(network, one, whole, steps, bf16=bf16),
        "apart": trainer(network, one, batch, steps, bf16=bf16),
        "together": trainer(network, world, whole, steps, bf16=bf16),
        "together, own statistics": trainer(network, world, whole, steps, bf16=bf16, sync_bn=False),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):  # the first is a warm-up
        for name, train in variants.items():
            world.barrier()
            start = time.perf_counter()
            if train is not None:
                train(repeat + 1)
            world.barrier()  # those with nothing to do sleep here
            if repeat:
                times[name].append(time.perf_counter() - start)
    if world.is_main:
        Path(out).write_text(json.dumps(times))
    world.leave()


def trainer(
    network: ModelConfig, world: World, batch: int, steps: int, *, bf16: bool, sync_bn: bool = True
) -> Callable[[int], None]:
    """A function that trains one epoch of `steps` global batches of 32 px."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch * steps, 32, 32, 3), dtype=torch.uint8, generator=generator)
    images = ResidentImages(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    context = Context(
        world=world, images=images, num_classes=10, seed=0, bf16=bf16, sync_bn=sync_bn, report=lambda end: None
    )
    config = replace(SimCLR(), batch=batch)
    model = context.prepare(ContrastiveModel(network))
    parallel = world.data_parallel(model)
    optimizer = simclr.make_optimizer(config, model)

    def train(epoch: int) -> None:
        loop = EpochLoop("simclr", epoch, epoch, context)
        simclr.train_epoch(config, model, parallel, optimizer, context, epoch, loop)

    return train


if __name__ == "__main__":
    rank(*json.loads(sys.argv[1]))
