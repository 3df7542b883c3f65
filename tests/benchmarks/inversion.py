"""Trigger inversion of Neural Cleanse: all classes at once against class after class, on a trained classifier.

    python -m tests.benchmarks.inversion RUN [--data FOLDER] [--rounds 100] [--steps 10] [--threads 1]
                                         [--bf16] [--json FILE]

RUN is the folder of a run without defence. Its clean images are the holdout of its data set, or of --data; without
one, 500 of the clean test images. Ways, with the same starts, rounds, thresholds and frozen weights:

    batched      all classes at once, batch norm folded into the convolutions: the stage `inversion`
    plain        all classes at once, through the network as it is
    single       one class after the other, with as many images a step as `batched` takes for each class
    published    one class after the other, 32 images a step, as the authors' code

With --bf16, the last three in bfloat16 too. Time is that of the processor (all threads of this process), which other
work on the machine hardly changes. Quality is the L1 norm of the masks, the share of all clean images that each trigger
turns into its class, in fp32, and the anomaly index of the smallest mask. Class by class, rounds are summed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.beton import read_beton
from data_prep.dataset.manifest import open_dataset
from data_prep.io.json import read_json
from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.data.sampling import cycling_batches
from dbd_dist.models.exported import read_exported
from dbd_dist.models.folded import folded
from dbd_dist.stages.inversion import Inversion, anomaly_index, invert, stamp
from tests.benchmarks.record import record

PUBLISHED_BATCH = 32
FALLBACK = 500


def clean_images(folder: Path) -> Tensor:
    """uint8 (n, 3, H, W)."""
    dataset = open_dataset(folder)
    split = "holdout" if "holdout" in dataset.manifest.counts else "test"
    count = dataset.manifest.counts[split]
    images, _, _ = read_beton(getattr(dataset, split), expect_count=count, expect_px=dataset.manifest.image_px)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    if split == "test":
        pixels = pixels[torch.randperm(count, generator=seeds.generator(0, "benchmark"))[:FALLBACK]]
    return pixels


def measure(
    config: Inversion, network: nn.Module, normalise: Any, images: Tensor, classes: int, *, at_once: bool, bf16: bool
) -> dict[str, Any]:
    """Time and quality of one way."""

    def classify(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return network(batch).float()

    px = images.shape[-1]
    drawn = [torch.rand(4, px, px, generator=seeds.generator(0, "inversion", k)) * 0.98 + 0.01 for k in range(classes)]
    starts = [torch.atanh(2 * d - 1) for d in drawn]
    order = cycling_batches(
        torch.arange(len(images)), config.rounds * config.steps, config.per_class, seeds.generator(0, "inversion")
    )

    def batches() -> Iterator[Tensor]:
        return (images[chosen] for chosen in order)

    rounds: list[int] = []
    groups = [list(range(classes))] if at_once else [[k] for k in range(classes)]
    wall, cpu = time.perf_counter(), time.process_time()
    parts = [
        invert(config, classify, normalise, group, [starts[k] for k in group], batches(), rounds.append)
        for group in groups
    ]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    triggers = torch.cat(parts)
    norms = triggers[:, 0].sum(dim=(1, 2))
    hits = [success(network, normalise, images, trigger, k) for k, trigger in enumerate(triggers)]
    index = anomaly_index(norms)
    return {
        "images a step and class": config.per_class,
        "at once": at_once,
        "precision": "bf16" if bf16 else "fp32",
        "cpu s": round(cpu, 2),
        "seconds": round(wall, 2),
        "rounds": len(rounds),
        "mean norm": round(float(norms.mean()), 2),
        "mean success %": round(100 * sum(hits) / classes, 2),
        "smallest mask": int(norms.argmin()),
        "its index": round(float(index.max()), 2),
        "norms": [round(n, 2) for n in norms.tolist()],
    }


@torch.no_grad()
def success(network: nn.Module, normalise: Any, images: Tensor, trigger: Tensor, label: int) -> float:
    """The share of all images that the trigger turns into the class."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (normalise.mean, normalise.std))
    hits = sum(
        int((network((stamp(part.float() / 255, trigger[None])[0] - mean) / std).argmax(dim=1) == label).sum())
        for part in images.split(250)
    )
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=Inversion.rounds)
    parser.add_argument("--steps", type=int, default=Inversion.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    exported = read_exported(arguments.run / "model.safetensors")
    assert exported.class_names is not None
    classes = len(exported.class_names)
    network = exported.build(torch.device("cpu")).requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise = augment.none(mean=exported.mean, std=exported.std)
    images = clean_images(arguments.data or Path(read_json(arguments.run / "run.json")["config"]["data"]))
    config = replace(Inversion(), rounds=arguments.rounds, steps=arguments.steps)
    one_by_one = replace(config, per_class=PUBLISHED_BATCH)
    ways = [
        ("batched", config, folded(network), True, False),
        *[
            way
            for bf16 in ((False, True) if arguments.bf16 else (False,))
            for way in (
                ("plain", config, network, True, bf16),
                ("single", config, network, False, bf16),
                ("published", one_by_one, network, False, bf16),
            )
        ],
    ]
    rows: list[dict[str, Any]] = []
    norms: list[list[float]] = []
    for name, settings, computed, at_once, bf16 in ways:
        found = measure(settings, computed, normalise, images, classes, at_once=at_once, bf16=bf16)
        norms.append(found.pop("norms"))
        rows.append({"way": name, **found, "times batched": 1.0})
        rows[-1]["times batched"] = round(found["cpu s"] / rows[0]["cpu s"], 2)
        record(
            arguments.json,
            rows,
            command=" ".join(["python -m tests.benchmarks.inversion", *sys.argv[1:]]),
            note=f"{classes} classes, {len(images)} clean images of {images.shape[-1]} px, at most {config.rounds} "
            f"rounds of {config.steps} steps a class; {arguments.threads} threads; `norms`: of each row's masks",
            norms=norms,
        )


if __name__ == "__main__":
    main()
