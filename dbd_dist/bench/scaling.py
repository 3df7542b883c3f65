"""Pretraining over 1, 2 and 4 processes of one thread each (gloo), the global batch unchanged.

Every process is a rank as `torchrun` would start it. More processes than cores share them, so that the figures of
those say what communication costs, not what more machines would give.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import median

import torch

from data_prep.errors import UserError
from data_prep.threads import available_cores
from dbd_dist.bench.row import Row, Setup
from dbd_dist.config import SimCLRConfig
from dbd_dist.loaders import ResidentImages
from dbd_dist.models import ContrastiveModel, ModelConfig
from dbd_dist.stages import simclr
from dbd_dist.stages.context import Context, Meter
from dbd_dist.world import World

WIDTHS = (16, 32, 96, 256)  # the network of cifar10_cpu


def measure(setup: Setup) -> Iterator[Row]:
    batch = setup.pick(cuda=64, cpu=64, quick=16)
    steps, repeats = setup.pick(cuda=4, cpu=4, quick=1), 1 if setup.quick else setup.repeats
    alone: list[float] = []
    cores = available_cores()
    for size in (1, 2, 4):
        times = launch(size, batch, steps, repeats, setup.quick)
        rates = [batch * steps / t for t in times]
        alone = alone or rates
        speedup = median(rates) / median(alone)
        yield Row(
            bench="scaling",
            name=f"SimCLR, batch {batch}, {size} process{'es' if size > 1 else ''} of one thread, fp32",
            unit="images/s",
            values=rates,
            notes={
                "speedup": speedup,
                "efficiency": speedup / min(size, cores),
                "cores": cores,
            },
        )


def launch(size: int, batch: int, steps: int, repeats: int, quick: bool) -> list[float]:
    """Seconds of every repeat, as rank 0 of `size` processes saw them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        environ = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "dbd_dist.bench.scaling", json.dumps([batch, steps, repeats, quick])]
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise UserError(f"a rank of {size} ended with an error", where="bench scaling")
    return json.loads(outputs[0].splitlines()[-1])


def rank(batch: int, steps: int, repeats: int, quick: bool) -> None:
    """What one of the processes runs."""
    torch.set_num_threads(1)
    world = World.join("cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch * steps, 32, 32, 3), dtype=torch.uint8, generator=generator)
    images = ResidentImages(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    context = Context(
        world=world, images=images, num_classes=10, seed=0, bf16=False, sync_bn=True, report=lambda end: None
    )
    network = ModelConfig(depths=(1, 1), widths=(8, 16)) if quick else ModelConfig(depths=(1, 1, 1, 1), widths=WIDTHS)
    config = SimCLRConfig(batch=batch)
    model = context.prepare(ContrastiveModel(network))
    parallel = world.data_parallel(model)
    optimizer = simclr.make_optimizer(config, model)
    times = []
    for repeat in range(repeats + 1):  # the first is a warm-up
        world.barrier()
        start = time.perf_counter()
        epoch = repeat + 1
        meter = Meter("simclr", epoch, epoch, context)
        simclr.train_epoch(config, model, parallel, optimizer, context, epoch, meter)
        world.barrier()
        times.append(time.perf_counter() - start)
    if world.is_main:
        print(json.dumps(times[1:]), flush=True)
    world.leave()


if __name__ == "__main__":
    rank(*json.loads(sys.argv[1]))
