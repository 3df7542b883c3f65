"""What a run of a preset costs on a CPU, from a few steps of each stage: processor time of one thread, which other work
on the machine disturbs little.

    python -m tests.benchmarks.steps imagenette_cpu --px 64 --images 9469 --json docs/results/steps_imagenette_cpu.json

Stages run as in a run, augmentation and optimiser included, on noise; what it shows does not matter to the time. The
processor time of the whole run is that of a step times the steps of the schedule: predicted, without start,
checkpoints, evaluation and what workers wait for each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbd_dist.bench.floor import flops
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.distributed.world import World
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel
from dbd_dist.presets import preset
from dbd_dist.stages import Split, Stage
from dbd_dist.stages.context import Context
from dbd_dist.stages.split import measure_losses
from tests.benchmarks.record import record

STEPS = 4
"""Of each stage."""


class Clock:
    """Takes the processor time after every step."""

    def __init__(self):
        self.times: list[float] = []

    def tick(self, *_: Any) -> None:
        self.times.append(time.process_time())

    def step_s(self) -> float:
        """The median step; the first is not counted."""
        return statistics.median(after - before for before, after in zip(self.times, self.times[1:]))


def context_of(config: Any, px: int, images: int, classes: int, clock: Clock) -> Context:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, px, px, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (images,), generator=generator)
    return Context(
        world=World(device=torch.device("cpu")), images=ResidentImages(pixels, labels), num_classes=classes,
        model=config.model, normalise=config.normalise, seed=0, bf16=True, sync_bn=True, report=lambda end: None,
        tick=clock.tick,
    )  # fmt: skip


def shortened(stage: Any, batch: int | None) -> Stage:
    """One epoch, with the batch that fits this machine."""
    names = {field.name for field in fields(stage)}
    changes: dict[str, Any] = {"epochs": 1} if "epochs" in names else {}
    if batch is not None and "batch" in names:
        changes["batch"] = batch
    if "warmup_epochs" in names:
        changes |= {"warmup_epochs": 0, "schedule_epochs": None}
    if "refresh" in names:
        changes["steps"] = STEPS
    return replace(stage, **changes)


def measure(name: str, px: int, images: int, classes: int, batch: int | None) -> list[dict[str, Any]]:
    """A row for every stage of DBD and of plain training."""
    rows, given = [], {}
    for method in ("none", "dbd"):
        config = preset(name).config(method)
        for stage in config.method.stages():
            given |= stage.offers()
            short = shortened(stage, batch)
            size = getattr(short, "batch", 1)
            clock = Clock()
            context = context_of(config, px, STEPS * size, classes, clock)
            if isinstance(short, Split):
                rows.append(_split(short, given, context, images, config))
                continue
            given |= short.run(context, given, None)
            steps = _steps(stage, images)
            step_s = clock.step_s() * (getattr(stage, "batch", size) / size)
            rows.append(
                {
                    "stage": stage.name, "batch measured": size, "step s": step_s, "epochs": _epochs(stage),
                    "steps an epoch": steps, "run s": step_s * steps * _epochs(stage),
                }
            )  # fmt: skip
    return rows


def _epochs(stage: Any) -> int:
    return stage.epochs


def _steps(stage: Any, images: int) -> int:
    return stage.steps if hasattr(stage, "steps") else images // stage.batch


def _split(split: Split, given: dict[str, Any], context: Context, images: int, config: Any) -> dict[str, Any]:
    """A pass over all images, before every epoch of MixMatch."""
    model = context.prepare(Classifier(config.model, context.num_classes))
    times = []
    for epoch in range(2):
        start = time.process_time()
        measure_losses(split, given["sample_loss"], model, context, epoch)
        times.append(time.process_time() - start)
    step_s = min(times) / len(context.images) * images
    epochs = config.method.mixmatch.epochs
    return {
        "stage": "split", "batch measured": split.batch, "step s": step_s, "epochs": epochs, "steps an epoch": 1,
        "run s": step_s * epochs,
    }  # fmt: skip


def network(config: ModelConfig, px: int, classes: int) -> dict[str, Any]:
    """Counts that sizes and floors follow from."""
    contrastive, classifier = ContrastiveModel(config), Classifier(config, classes)
    image = torch.zeros(1, 3, px, px)
    classifier.eval()
    with torch.no_grad():
        forward = flops(lambda: classifier(image))
    norms = [part for part in contrastive.modules() if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d)]
    return {
        "parameters, backbone": sum(p.numel() for p in classifier.backbone.parameters()),
        "parameters, SimCLR": sum(p.numel() for p in contrastive.parameters()),
        "parameters, classifier": sum(p.numel() for p in classifier.parameters()),
        "batch norms, SimCLR": len(norms),
        "channels of batch norms, SimCLR": sum(norm.num_features for norm in norms),
        "GFLOP an image, forward": forward / 1e9,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write a file of docs/results/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--px", type=int, required=True, help="side of the images")
    parser.add_argument("--images", type=int, required=True, help="of the training set")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, help="of every stage, where the preset's does not fit; a step is scaled")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.process_time()
    rows = measure(arguments.preset, arguments.px, arguments.images, arguments.classes, arguments.batch)
    words = ["python -m tests.benchmarks.steps", *(argv if argv is not None else sys.argv[1:])]
    more = {
        "measuring s": time.process_time() - started,
        "network": network(preset(arguments.preset).model, arguments.px, arguments.classes),
    }
    note = "processor seconds of one thread, bf16; run s is predicted"
    record(arguments.json, rows, command=" ".join(words), note=note, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
