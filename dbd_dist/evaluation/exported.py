"""Measuring the model that a run exported, without the trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_prep.dataset.manifest import check_recorded, open_dataset
from data_prep.errors import UserError
from data_prep.io.json import read_json
from dbd_dist.config import TrainConfig
from dbd_dist.data import augment
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.evaluator import EvalResult, Evaluator
from dbd_dist.models.exported import read_exported


def measure_run(run: Path, data: Path | None = None) -> EvalResult:
    """Measure a run's model on its own data set, or another one.

    Raises:
        UserError: the run exported no model, or the data set does not fit it.
    """
    exported = read_exported(run / "model.safetensors")
    classes = len(exported.class_names or ())
    description = _description(run / "run.json", needed=data is None)
    if data is None:
        data = _own_data(description, run / "run.json")
        check_recorded(data, (description or {}).get("data_hash"), run / "run.json")
    dataset = open_dataset(data)
    if dataset.manifest.num_classes != classes:
        raise UserError(f"the data set has {dataset.manifest.num_classes} classes, the model {classes}", where=data)
    if dataset.manifest.image_px != exported.image_px:
        raise UserError(
            f"the data set has images of {dataset.manifest.image_px} px, the model is for {exported.image_px} px",
            where=data,
        )
    world = World.join("auto")
    model = exported.build(world.device)
    if description is not None:
        model = TrainConfig.from_dict(description["config"], where=f"{run / 'run.json'}: config").method.at_test_time(
            model
        )
    normalise = augment.none(mean=exported.mean, std=exported.std)
    return Evaluator(dataset, world, normalise, bf16=False).measure(model)


def _description(path: Path, *, needed: bool) -> dict[str, Any] | None:
    """A run's run.json; None where there is none and nobody needs it."""
    if not needed and not path.exists():
        return None
    try:
        description = read_json(path)
        if not isinstance(description["config"], dict):
            raise TypeError("config is not an object")
        return description
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=path, hint="name a dataset folder with --data"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a run description ({error})", where=path) from error


def _own_data(description: dict[str, Any] | None, path: Path) -> Path:
    """The dataset folder that a run's description names."""
    data = (description or {"config": {}})["config"].get("data")
    try:
        os.fsencode(data)  # type: ignore[arg-type]
        if not isinstance(data, str) or "\0" in data:
            raise TypeError("config.data is no path")
        return Path(data)
    except (ValueError, TypeError) as error:
        raise UserError(f"not a run description ({error})", where=path) from error
