"""Whole short runs, from dataset folder to result: one epoch of every stage, checkpoints and figures included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from dbd_dist.bench.row import Row, Setup
from dbd_dist.config import TrainConfig, override
from dbd_dist.launch.local import run_local
from dbd_dist.presets import preset


def short_run(setup: Setup) -> TrainConfig:
    """The CIFAR-10 recipe with one epoch a stage; on a CPU with the small network of cifar10_cpu."""
    manifest = setup.dataset.manifest
    count = manifest.counts["train"]
    name = "cifar10_cpu" if setup.device.type == "cpu" else "cifar10_badnets"
    config = preset("smoke" if setup.quick else name).config("dbd")
    stages = config.to_dict()
    changes = {
        "simclr.epochs": 1,
        "simclr.schedule_epochs": None,
        "simclr.warmup_epochs": 0,
        "simclr.batch": min(stages["simclr"]["batch"], count // 2),
        "warmup.epochs": 1,
        "warmup.batch": min(stages["warmup"]["batch"], count // 2),
        "mixmatch.epochs": 1,
        "mixmatch.steps": setup.pick(cuda=256, cpu=4, quick=2),
        "mixmatch.batch": min(64, count // 4),
    }
    return replace(
        override(config, changes),
        data=setup.dataset.folder.resolve(),
        compute=replace(config.compute, workers=1, device=setup.device.type, threads=setup.threads),
    )


def measure(setup: Setup) -> Iterator[Row]:
    config = short_run(setup)
    walls: list[float] = []
    stages: dict[str, list[dict]] = {}
    for repeat in range(1 if setup.quick else min(setup.repeats, 3)):
        storage = setup.scratch / f"epoch{repeat}"
        start = time.perf_counter()
        run_local(config, storage=storage, name="run", quiet=True)
        walls.append(time.perf_counter() - start)
        for line in (storage / "run" / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            stages.setdefault(row["stage"], []).append(row)
    for stage, found in stages.items():
        seconds = [row["time_s"] for row in found]
        yield Row(
            bench="epoch",
            name=f"{stage}, one epoch of {config.preset}, {setup.precision}",
            unit="s",
            values=seconds,
            notes={"images_per_s": median(row["images_per_s"] for row in found)},
        )
    inside = [sum(found[i]["time_s"] for found in stages.values()) for i in range(len(walls))]
    yield Row(
        bench="epoch",
        name="whole run from dataset folder to result",
        unit="s",
        values=walls,
        notes={"share_outside_epochs": median(1 - i / w for i, w in zip(inside, walls, strict=True))},
    )
