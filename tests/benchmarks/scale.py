"""What docs/scale.md takes from this machine: costs that grow with the number of images and that every worker pays, and
counts of the ImageNet presets.

    python -m tests.benchmarks.scale --json docs/results/scale.json

Processor time of one thread; sizes of runs by the formula of `dbd_dist.runtime.disk`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dbd_dist.data import augment
from dbd_dist.data.sampling import epoch_batches, keep_lowest
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import ContrastiveModel
from dbd_dist.presets import preset
from dbd_dist.runtime.disk import of_run
from tests.benchmarks.record import record

PRESET = "imagenet_subset_badnets"
SETS = {"30 classes": (38_400, 30), "ImageNet-1k": (1_281_167, 1000)}
"""Training images (1,280 a class where the classes are not named) and classes."""


def row(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit}


def cpu_s(work: Callable[[], object], repeats: int = 3) -> float:
    """The least processor time."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def on_every_worker(name: str, count: int) -> Iterator[dict[str, Any]]:
    """What a split and an epoch cost each worker, whatever its part of the images."""
    generator, weak = torch.Generator().manual_seed(0), augment.weak_resized()

    def draw() -> augment.Params:
        return augment.draw(weak, count, height=224, width=224, generator=generator)

    params = [value for value in vars(draw()).values() if isinstance(value, Tensor)]
    losses = torch.rand(count, generator=generator)
    yield row(f"{name}: augmentation drawn for a split", cpu_s(draw), "s")
    yield row(f"{name}: what is drawn, kept", sum(value.nbytes for value in params) / 1e6, "MB")
    yield row(f"{name}: ranking and halving the losses", cpu_s(lambda: keep_lowest(losses, 0.5)), "s")
    yield row(f"{name}: order of an epoch", cpu_s(lambda: epoch_batches(count, 512, generator)), "s")
    yield row(f"{name}: losses of a split, gathered", losses.nbytes / 1e6, "MB")


def on_disk(name: str, count: int, classes: int) -> Iterator[dict[str, Any]]:
    manifest = SimpleNamespace(counts={"train": count}, num_classes=classes)
    dataset: Any = SimpleNamespace(manifest=manifest)
    sizes = of_run(preset(PRESET).config("dbd"), dataset)
    for part in ("checkpoints", "stages", "exports", "tables", "total"):
        yield row(f"{name}: a run of DBD, {part}", getattr(sizes, part) / 1e6, "MB")


def saved(config: ModelConfig, px: int) -> float:
    """Elements that a view's forward pass keeps for the backward pass, in activations."""
    kept: list[int] = []
    model = ContrastiveModel(config).to("meta")

    def note(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter) and x.dim() > 1 and x.shape[0] == 2:
            kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(torch.zeros(2, 3, px, px, device="meta"))
    return sum(kept) / 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write a file of docs/results/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name, (count, classes) in SETS.items():
        rows += [*on_every_worker(name, count), *on_disk(name, count, classes)]
    rows.append(row("activations saved, a view of 32 px, CIFAR stem", saved(ModelConfig(), 32) / 1e6, "million"))
    rows.append(row("activations saved, a view of 224 px", saved(preset(PRESET).model, 224) / 1e6, "million"))
    block = bytes(1 << 28)
    rate = len(block) / cpu_s(lambda: hashlib.sha256(block).digest()) / 1e9
    rows.append(row("sha256 of a file in memory", rate, "GB/s"))
    note = "processor time of one thread; sizes of runs are upper bounds by the formula"
    record(arguments.json, rows, command="python -m tests.benchmarks.scale", note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
