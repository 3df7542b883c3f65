"""What Ray adds to a run: to every epoch (its report is a barrier and hands over a checkpoint), and once.

The same training under `torchrun` and under Ray Train, in turn, several times. An epoch is the time from one line of
the run's log to the next, so that reports and checkpoints are in it. The first epoch, which warms up, and the last,
which evaluates, do not count.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from dbd_dist.bench.images import prepare_synthetic
from dbd_dist.bench.row import Row, Setup
from dbd_dist.bench.scaling import own_cores

EPOCHS = 10
TRAIN_IMAGES = 512
BATCH = 128
"""Over all workers, as the presets have it."""
LAUNCHERS = ("torchrun", "ray")


def measure(setup: Setup) -> Iterator[Row]:
    quick = setup.quick
    epochs = 4 if quick else EPOCHS
    count = 100 if quick else TRAIN_IMAGES
    dataset = prepare_synthetic(setup.scratch / "ray-data", train=count, test=20, px=32)
    for workers in (1, 2):
        if workers > len(own_cores()):
            return
        each: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
        once: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
        for repeat in range(setup.repeats):
            for launcher in LAUNCHERS if repeat % 2 == 0 else LAUNCHERS[::-1]:
                marks, start, end = _run(setup, dataset, launcher, workers, epochs, repeat)
                steady = [b - a for a, b in itertools.pairwise(marks[:-1])]
                each[launcher].append(median(steady))
                once[launcher].append(end - start - (marks[-1] - marks[0]) - median(steady))
        title = f"{workers} worker{'s' if workers > 1 else ''}, {'small network' if quick else 'ResNet-18'}"
        for name in LAUNCHERS:
            notes = {"epochs_a_run": epochs - 2}
            yield Row(bench="ray", name=f"an epoch of {count} images, {title}, {name}", unit="s", values=each[name],
                      notes=notes)  # fmt: skip
        added = [ray / plain - 1 for ray, plain in zip(each["ray"], each["torchrun"], strict=True)]
        of_medians = median(each["ray"]) / median(each["torchrun"]) - 1
        yield Row(
            bench="ray", name=f"what Ray adds to an epoch, {title}", unit="fraction", values=added,
            notes={"of_medians": of_medians},
        )  # fmt: skip
        for name in LAUNCHERS:
            yield Row(bench="ray", name=f"start, first epoch's warm-up and end, {title}, {name}", unit="s",
                      values=once[name])  # fmt: skip


def _run(
    setup: Setup, dataset: Dataset, launcher: str, workers: int, epochs: int, repeat: int
) -> tuple[list[float], float, float]:
    """A `dbd train`: when each epoch was logged, when the command began and when it ended; seconds of one clock.

    Raises:
        UserError: it ended with an error.
    """
    name, storage = f"{launcher}{workers}-{repeat}", setup.scratch / "ray"
    model = [] if setup.quick else ["--model.depths", "2", "2", "2", "2", "--model.widths", "64", "128", "256", "512"]
    train = [
        "train", "smoke", "--method", "none", "--launcher", "ray" if launcher == "ray" else "local", *model,
        "--data", str(dataset.folder.resolve()), "--storage", str(storage), "--name", name,
        "--supervised.epochs", str(epochs), "--supervised.batch", str(64 if setup.quick else BATCH),
        "--evaluate-every", "0", "--compute.workers", str(workers), "--compute.device", setup.device.type,
        "--compute.threads", "1",
    ]  # fmt: skip
    starter = [sys.executable, "-m"]
    if launcher == "torchrun":
        starter += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(workers), "-m"]
    drop = ("RAY_ADDRESS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    environ = {name: value for name, value in os.environ.items() if name not in drop}
    log = setup.scratch / f"{name}.log"
    start = time.time()
    with log.open("w") as file:
        command = [*starter, "dbd_dist.cli", *train]
        code = subprocess.run(command, stdout=file, stderr=file, env=environ, check=False).returncode
    end = time.time()
    if code:
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        raise UserError(f"dbd train ended with code {code}: {last}", where=" ".join(command))
    marks = _epoch_ends(storage / name)
    if len(marks) != epochs:
        raise UserError(f"{len(marks)} of {epochs} epochs were logged", where=storage / name)
    return marks, start, end


def _epoch_ends(run: Path) -> list[float]:
    """When each epoch was logged, as its event files say."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.wall_time for event in events.Scalars("supervised/loss")]
