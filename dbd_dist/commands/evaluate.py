"""`dbd evaluate RUN`: measure the exported model of a run again, on its data set or another one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError


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
    description = arguments.run / "model.json"
    weights = arguments.run / "model.safetensors"
    for path in (description, weights, arguments.run / "run.json"):
        if not path.exists():
            raise UserError("there is no such file", where=path, allowed="the folder of a finished run")

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from data_prep.manifest import open_dataset
    from dbd_dist import augment
    from dbd_dist.config import from_dict
    from dbd_dist.evaluate import Examiner
    from dbd_dist.models import Classifier, ModelConfig
    from dbd_dist.world import World

    try:
        model_json = json.loads(description.read_text())
        run_json = json.loads((arguments.run / "run.json").read_text())
        network = from_dict(ModelConfig, model_json["network"], where=f"{description}: network")
        normalise = augment.none(mean=tuple(model_json["mean"]), std=tuple(model_json["std"]))
        data = arguments.data or Path(run_json["config"]["data"])
        classes = len(model_json["class_names"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a model description ({error})", where=description) from error
    dataset = open_dataset(data)
    if dataset.manifest.num_classes != classes:
        raise UserError(f"the data set has {dataset.manifest.num_classes} classes, the model {classes}", where=data)
    model = Classifier(network, classes)
    try:
        model.load_state_dict(load_file(str(weights)))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"not the weights of this model ({str(error).splitlines()[0]})", where=weights) from error
    world = World.join("auto")
    model.to(world.device)
    print(json.dumps(dataclasses.asdict(Examiner(dataset, world, normalise, bf16=False).measure(model)), indent=2))
    return 0
