"""`dbd evaluate RUN`: measure the exported model of a run again, on its data set or another one."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError
from data_prep.io.json import read_json


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure a run's model: clean accuracy, attack success, robust and per-class accuracy, as JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    data: Path | None = None
    """Dataset folder; the run's own unless given."""


def main(argv: list[str]) -> int:
    """Load model.safetensors without the trainer, examine it, print JSON."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd evaluate")
    from data_prep.dataset.manifest import open_dataset
    from dbd_dist.data import augment
    from dbd_dist.distributed.world import World
    from dbd_dist.evaluation.evaluator import Evaluator
    from dbd_dist.models.exported import read_exported

    exported = read_exported(arguments.run / "model.safetensors")
    classes = len(exported.class_names or ())
    data = arguments.data or _own_data(arguments.run / "run.json")
    dataset = open_dataset(data)
    if dataset.manifest.num_classes != classes:
        raise UserError(f"the data set has {dataset.manifest.num_classes} classes, the model {classes}", where=data)
    if dataset.manifest.image_px != exported.image_px:
        raise UserError(
            f"the data set has images of {dataset.manifest.image_px} px, the model is for {exported.image_px} px",
            where=data,
        )
    normalise = augment.none(mean=exported.mean, std=exported.std)
    world = World.join("auto")
    model = exported.build(world.device)
    print(json.dumps(dataclasses.asdict(Evaluator(dataset, world, normalise, bf16=False).measure(model)), indent=2))
    return 0


def _own_data(path: Path) -> Path:
    """The dataset folder that a run's description names."""
    try:
        data = read_json(path)["config"]["data"]
        os.fsencode(data)
        if "\0" in data:
            raise TypeError("config.data is no path")
        return Path(data)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, hint="name a dataset folder with --data"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a run description ({error})", where=path) from error
