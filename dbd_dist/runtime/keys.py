"""Hashes of stages, over exactly what each depends on: equal keys, equal results."""

from __future__ import annotations

from typing import Any

from data_prep.dataset.manifest import Dataset
from dbd_dist.config import TrainConfig
from dbd_dist.fields import digest
from dbd_dist.models.given import model_key

REVISION = 3
"""Counted up whenever a change of the code changes what every stage computes; `Stage.revision` is a stage's own."""


def stage_keys(config: TrainConfig, dataset: Dataset, *, bf16: bool, workers: int = 1) -> dict[str, str]:
    """The key of every stage that trains, by its name; see `keys_on`."""
    manifest = dataset.manifest
    return keys_on(config, manifest.data_hash, manifest.num_classes, bf16=bf16, workers=workers)


def keys_on(config: TrainConfig, data: str, classes: int, *, bf16: bool, workers: int = 1) -> dict[str, str]:
    """The key of every stage that trains, by its name, on the data set of that hash.

    A key covers the stage's settings, the keys of the stages that it reads from, and where it reads from none that
    trains, what all stages depend on: data, seed, network, precision, batch norm over ranks, and without the last the
    number of workers. The number of classes counts for every stage but those that give a backbone alone, which has no
    head. Versions of libraries are left out: they change results by rounding.
    """
    compute = config.compute
    surroundings = {
        "revision": REVISION,
        "data": data,
        "seed": config.seed,
        "model": model_key(config.model),
        "bf16": bf16,
        "sync_bn": compute.sync_bn,
    }
    if not compute.sync_bn:  # each worker then has statistics of its own
        surroundings["workers"] = workers if compute.min_workers is None else [compute.min_workers, compute.workers]
    keys: dict[str, str] = {}
    givers: dict[str, Any] = {}  # name of what is given -> the latest stage that gives it
    for stage in config.method.stages():
        if stage.trains:
            read = _readers(stage, givers)
            trained = [keys[parent.name] for parent in read if parent.trains]
            settings = [parent.key_values() for parent in read if not parent.trains]
            head = [] if stage.gives == ("backbone",) else [{"classes": classes}]
            keys[stage.name] = digest([*(trained or [surroundings]), *settings, *head, stage.key_values()])
        givers |= dict.fromkeys(stage.gives, stage)
    return keys


def _readers(stage: Any, givers: dict[str, Any]) -> list[Any]:
    """The stages that a stage reads from, each once; through those without training also what they read from."""
    found: list[Any] = []
    for name in stage.reads:
        parent = givers[name]
        if not parent.trains:
            found += [above for above in _readers(parent, givers) if above not in found]
        if parent not in found:
            found.append(parent)
    return found


def method_hash(config: TrainConfig) -> str:
    """A hash over what decides a run's result: everything but where its data lies and what it runs on."""
    values = config.to_dict()
    del values["data"], values["preset"]
    values["model"] = model_key(config.model)
    values["compute"] = {name: values["compute"][name] for name in ("precision", "sync_bn")}
    return digest(values)
