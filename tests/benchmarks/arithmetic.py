"""What a recipe costs in counted operations.

They are those of the matrix products and convolutions of every stage, backward passes included, a multiplication and an
addition as two. No time is measured; what a device makes of it is another matter.

    python -m tests.benchmarks.arithmetic cifar10_badnets --images 50000 --json docs/results/arithmetic.json

Stages run as in a run, on a few images of noise. Operations grow in proportion to images and steps, so that a run's
follow from those of one epoch with one step, of one with two steps, of two and of four epochs. (Distances between all
features grow with the square of the images, and are as good as left out: 0.003 PFLOP for 50,000.)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbd_dist.bench.floor import flops
from dbd_dist.presets import preset
from dbd_dist.stages import MixMatch, Split, Stage
from tests.benchmarks.record import record
from tests.benchmarks.steps import Clock, context_of

BATCH = 20
"""Images of the smallest step that is counted; operations an image hardly depend on it."""
METHODS = ("none", "dbd", "dbd-robust")


def operations(config: Any, px: int, images: int, classes: int) -> list[dict[str, Any]]:
    """A row for every stage that trains, in the method's order."""
    rows, given = [], {}
    for stage in config.method.stages():
        given |= stage.offers()
        if not isinstance(stage, Split):
            rows.append(_row(stage, given, config, px, images, classes))
    return rows


def _row(stage: Any, given: dict[str, Any], config: Any, px: int, images: int, classes: int) -> dict[str, Any]:
    stepped = hasattr(stage, "steps")
    there = 8 * BATCH if stepped else 2 * BATCH

    def count(steps: int, epochs: int = 1) -> int:
        context = context_of(config, px, there if stepped else steps * BATCH, classes, Clock())
        return flops(lambda: given.update(_short(stage, steps, epochs).run(context, dict(given), None)))

    one = count(1)
    small = count(2) - one
    every = once = 0.0
    if stepped:
        two, four = count(1, epochs=2), count(1, epochs=4)  # what is left out for half of the epochs is so in both
        every = (four - two) / 2 - small
        once = two - 2 * (small + every)
    # MixMatch splits all images, and looks for patterns once; uat looks for perturbations in batches
    scale = images / there if isinstance(stage, MixMatch) else stage.batch / BATCH
    renewals = math.ceil(stage.epochs / getattr(stage, "refresh", 1))
    beside = scale * (once + renewals * every)
    a_step, steps = small / BATCH * stage.batch, stage.steps if stepped else images // stage.batch
    return {
        "stage": stage.name, "epochs": stage.epochs, "steps an epoch": steps, "batch": stage.batch,
        "TFLOP a step": a_step / 1e12, "PFLOP": (stage.epochs * steps * a_step + beside) / 1e15,
    }  # fmt: skip


def _short(stage: Any, steps: int, epochs: int) -> Stage:
    """A few epochs of small batches."""
    names = {field.name for field in dataclasses.fields(stage)}
    changes: dict[str, Any] = {"epochs": epochs, "batch": BATCH}
    if "steps" in names:
        changes["steps"] = steps
    if "warmup_epochs" in names:
        changes |= {"warmup_epochs": 0, "schedule_epochs": None}
    return dataclasses.replace(stage, **changes)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and write a file of docs/results/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset", help="as of `dbd train`")
    parser.add_argument("--px", type=int, default=32, help="side of the images")
    parser.add_argument("--images", type=int, required=True, help="of the training set")
    parser.add_argument("--classes", type=int, default=10, help="default: 10")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        config = preset(arguments.preset).config(method)
        found = operations(config, arguments.px, arguments.images, arguments.classes)
        total = sum(row["PFLOP"] for row in found)
        rows += [{"method": method, **row} for row in found]
        rows.append({"method": method, "stage": "all", "PFLOP": total})
    words = ["python -m tests.benchmarks.arithmetic", *(argv if argv is not None else sys.argv[1:])]
    record(arguments.json, rows, command=" ".join(words), note="counted operations of training; nothing is timed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
