"""Peak memory of a training step: of the device, or of a process of its own on a CPU."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.bench.row import Row, Setup
from dbd_dist.bench.step import CLASSES, make_context, network_for
from dbd_dist.models.heads import Classifier, ContrastiveModel
from dbd_dist.stages import MixMatch, SimCLR, mixmatch, simclr
from dbd_dist.stages.epoch_loop import EpochLoop


def measure(setup: Setup) -> Iterator[Row]:
    batch = setup.pick(cuda=512, cpu=32, quick=8)
    mixed = setup.pick(cuda=64, cpu=12, quick=6)
    for name, arguments in (
        (f"SimCLR step, batch {batch}", ("simclr", batch, None)),
        (f"SimCLR step, batch {batch} in chunks of {batch // 4}", ("simclr", batch, batch // 4)),
        (f"MixMatch step, batch {mixed}", ("mixmatch", mixed, None)),
    ):
        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setup.device)
            before = torch.cuda.memory_allocated(setup.device)
            step(setup, *arguments)
            peak = torch.cuda.max_memory_allocated(setup.device) - before
        else:
            peak = _in_a_process(setup, arguments)
        yield Row(
            bench="memory",
            name=f"{name}, {setup.precision}, network and optimiser included",
            unit="MiB",
            values=[peak / 2**20],
        )


def step(setup: Setup, stage: str, batch: int, chunk: int | None) -> None:
    """Two steps of a stage, so that the optimiser's state is there."""
    context = make_context(setup, 4 * batch)
    if stage == "simclr":
        config = SimCLR(batch=batch, chunk=chunk)
        model = context.prepare(ContrastiveModel(network_for(setup)))
        optimizer = simclr.make_optimizer(config, model)
        simclr.train_epoch(config, model, model, optimizer, context, 1, EpochLoop("simclr", 1, 1, context))
        return
    config = MixMatch(batch=batch, steps=2)
    model = context.prepare(Classifier(network_for(setup), CLASSES))
    backward = mixmatch.make_backward(config, model, context)
    loop = EpochLoop("mixmatch", 1, 1, context)
    kept = torch.arange(len(context.images)) % 2 == 0
    mixmatch.train_epoch(config, model, backward, optim.adam(model.parameters(), 1e-3), context, 1, (kept, ~kept), loop)


def _in_a_process(setup: Setup, arguments: tuple[str, int, int | None]) -> int:
    """Bytes that a fresh process grew by."""
    command = [sys.executable, "-m", "dbd_dist.bench.memory", json.dumps([setup.quick, setup.threads, *arguments])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"the measured process ended with code {done.returncode}", where="bench memory")
    return int(done.stdout.splitlines()[-1])


def _main(quick: bool, threads: int, stage: str, batch: int, chunk: int | None) -> None:
    torch.set_num_threads(threads)
    unused: object = None  # a step needs no data set
    setup = Setup(dataset=unused, scratch=Path(), device=torch.device("cpu"), quick=quick)  # type: ignore[arg-type]
    tiny = Setup(dataset=unused, scratch=Path(), device=torch.device("cpu"), quick=True)  # type: ignore[arg-type]
    step(tiny, stage, 6, None)  # libraries, compiled code
    before = _peak()
    step(setup, stage, batch, chunk)
    print(_peak() - before)


def _peak() -> int:
    """Bytes: the most that this process has held. What `getrusage` tells on Linux includes the parent's, from before
    the program was started."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
