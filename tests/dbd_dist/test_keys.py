"""Every setting that a stage reads is in its key, and in those of the stages after it: each is changed in turn."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args, get_origin

import pytest
import torch
from torch import nn

from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from dbd_dist.config import ComputeConfig, TrainConfig, override
from dbd_dist.models import BACKBONES, given
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.given import model_key
from dbd_dist.runtime.keys import method_hash, stage_keys

READS = {"simclr": [], "warmup": ["simclr"], "split": [], "mixmatch": ["simclr", "warmup", "split"], "supervised": []}
"""By stage: whose settings its result depends on, beside its own."""
OF_A_RUN = {"precision", "sync_bn"}
"""Fields of `compute` that a result depends on; `workers` and `min_workers` where batch norm is a worker's own."""
NOT_OF_A_RUN = {
    "workers", "min_workers", "device", "threads", "compile", "cuda_graphs", "resident_gib", "stage", "checkpoint_s",
    "checkpoint_steps", "patience_s", "mirror", "stall_s", "keep_ray_results", "defender_metrics",
    "cpus_per_worker", "gpus_per_worker", "labels", "log", "placement", "profile", "wait_s",
}  # fmt: skip
"""Those that change where, how fast and how safely it computes; at most rounding."""


def others(kind: Any, value: Any) -> Iterator[Any]:
    """Values that a field of that type may have in the place of `value`."""
    if get_origin(kind) is typing.Annotated:
        kind = get_args(kind)[0]
    options = get_args(kind) if get_origin(kind) is not None and get_origin(kind) is not tuple else ()
    if get_origin(kind) is Literal:
        yield from (option for option in options if option != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, value * 2, 2)
    elif isinstance(value, float):
        yield from (value * 1.1 + 0.01, value * 0.9)
    elif value is None:
        yield from ((60, 2, 1) if int in options or float in options else ("x",))
    elif isinstance(value, tuple | list):
        yield [v * 2 for v in value]
        yield [value[0] * 1.1, *value[1:]]
        yield [v * 1.01 + 0.001 for v in value]
        yield [*value[:-1], value[-1] * 1.1]
        yield [*value, 9]


def fields_of(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, value) of every field, those of nested settings too."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{prefix}.{field.name}")
        else:
            yield f"{prefix}.{field.name}", hints[field.name], value


def changed(config: TrainConfig, name: str, kind: Any, value: Any) -> TrainConfig:
    """The configuration with another value of that field."""
    for other in others(kind, value):
        try:
            found = override(config, {name: other})
        except UserError:
            continue
        if found != config:
            return found
    raise AssertionError(f"no other value of {name} is allowed beside {value!r}: add one to `others`")


@pytest.fixture(scope="module")
def dataset(digits) -> Dataset:
    return open_dataset(digits)


def keys(config: TrainConfig, dataset: Dataset, **more: Any) -> dict[str, str]:
    return stage_keys(config, dataset, **({"bf16": False} | more))


@pytest.mark.parametrize("method", ["dbd", "none"])
def test_every_setting_of_a_stage(method, smoke_config, smoke_none, dataset):
    config = {"dbd": smoke_config, "none": smoke_none}[method]
    if method == "dbd":  # so that its epochs may be changed alone
        config = override(config, {"simclr.schedule_epochs": 4})
    before = keys(config, dataset)
    count = 0
    for stage in config.method.stages():
        for name, kind, value in fields_of(stage, stage.name):
            if name.endswith((".mean", ".std")):
                continue  # one for all stages, below
            found = keys(changed(config, name, kind, value), dataset)
            for trained in config.method.trained():
                depends = stage.name in (trained.name, *READS[trained.name])
                assert (found[trained.name] != before[trained.name]) == depends, (name, trained.name)
            count += 1
    assert count > 10


def test_the_normalisation_of_all_stages(smoke_config, dataset):
    before = keys(smoke_config, dataset)
    for field in ("mean", "std"):
        names = [f"{stage.name}.augment.{field}" for stage in smoke_config.method.stages()]
        found = keys(override(smoke_config, {name: [0.3, 0.31, 0.32] for name in names}), dataset)
        assert all(found[stage] != before[stage] for stage in before)


def test_every_setting_of_the_network(smoke_config, dataset, tmp_path):
    before = keys(smoke_config, dataset)
    for name, kind, value in fields_of(smoke_config.model, "model"):
        if name == "model.weights":
            continue  # by what is in the file: tests/dbd_dist/test_given.py
        other = override(smoke_config, {name: "resnet18"}) if name == "model.backbone" else None
        found = keys(other or changed(smoke_config, name, kind, value), dataset)
        assert all(found[stage] != before[stage] for stage in before), name


def test_surroundings(smoke_config, dataset):
    before = keys(smoke_config, dataset)
    manifest = dataset.manifest
    for config, data, more in (
        (replace(smoke_config, seed=1), dataset, {}),
        (smoke_config, replace(dataset, manifest=replace(manifest, data_hash="0" * 64)), {}),
        (smoke_config, dataset, {"bf16": True}),
        (override(smoke_config, {"compute.sync_bn": False}), dataset, {}),
    ):
        found = keys(config, data, **more)
        assert all(found[stage] != before[stage] for stage in before)
    wider = replace(dataset, manifest=replace(manifest, num_classes=11, class_names=(*manifest.class_names, "x")))
    found = keys(smoke_config, wider)
    assert [stage for stage in before if found[stage] != before[stage]] == ["warmup", "mixmatch"]
    assert keys(smoke_config, dataset, workers=2) == before


def test_workers_count_where_each_has_a_batch_norm_of_its_own(smoke_config, dataset):
    own = override(smoke_config, {"compute.sync_bn": False})
    one, two = (keys(own, dataset, workers=count) for count in (1, 2))
    assert all(one[stage] != two[stage] for stage in one)
    elastic = replace(own, compute=replace(own.compute, workers=4, min_workers=2))  # the number changes within a run
    assert keys(elastic, dataset, workers=2) == keys(elastic, dataset, workers=4) != one


def test_how_it_computes_is_in_no_key(smoke_config, dataset):
    """A new field of `compute` has to be put into one of the two sets."""
    assert {f.name for f in dataclasses.fields(ComputeConfig)} == OF_A_RUN | NOT_OF_A_RUN
    before, run = keys(smoke_config, dataset), method_hash(smoke_config)
    values = {"threads": 2, "compile": "off", "cuda_graphs": "off", "resident_gib": 1.0, "checkpoint_steps": 3,
              "patience_s": 1.0, "stall_s": 9.0, "keep_ray_results": False, "mirror": "file:///x"}  # fmt: skip
    for name, value in values.items():
        other = override(smoke_config, {f"compute.{name}": value})
        assert (keys(other, dataset), method_hash(other)) == (before, run)


class Net(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images).mean((2, 3))


class Plugin:
    width: ClassVar[int] = 4
    min_image_px = 8

    @property
    def feature_dim(self) -> int:
        return self.width

    def build(self) -> nn.Module:
        return Net(self.width)


def test_the_code_of_another_packages_backbone(monkeypatch):
    """Its name and fields stay the same when its author changes the network."""
    monkeypatch.setattr(BACKBONES, "find", lambda name, where: Plugin)
    monkeypatch.setattr(given, "_tensors", given._tensors.__wrapped__)  # another process has another cache
    config = ModelConfig(backbone="plugin")
    before = model_key(config)
    monkeypatch.setattr(Plugin, "width", 5)
    assert model_key(config) != before
    assert "tensors" not in model_key(ModelConfig())
