"""Room on the storage: what the formulas say against what runs, data sets and artefacts really take."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from data_prep import pipeline
from data_prep.beton import file_bytes
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.craft.adaptive import Adaptive
from dbd_dist.craft.craft import TrainingSet
from dbd_dist.craft.label_consistent import LabelConsistent
from dbd_dist.launch.local import run_local
from dbd_dist.models.config import ModelConfig
from dbd_dist.runtime import disk as space
from dbd_dist.runtime.checkpoint import Checkpoints

FACTOR = 4
"""The formula may say this much more than there is in the end: a third checkpoint while it is written, the margin,
and fixed sizes that count for a run as small as a test's."""


@pytest.fixture
def full_disk(monkeypatch):
    """Leaves a number of bytes free, whatever the disk really has."""

    def leave(free: int) -> None:
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return leave


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, None, {"stop_after": "simclr"}, {"stop_after": "warmup"}], ids=str)
def test_a_run_takes_no_more_than_the_formula_says(change, smoke_config, smoke_none, tmp_path, monkeypatch):
    model = ModelConfig(depths=(1, 1), widths=(16, 64), projection_dim=32)  # so that weights count
    config = replace(smoke_none if change is None else smoke_config, model=model, **(change or {}))
    most = 0
    write = Checkpoints._write

    def watch(self, state) -> None:
        nonlocal most
        write(self, state)
        most = max(most, space.used_bytes(tmp_path))

    monkeypatch.setattr(Checkpoints, "_write", watch)
    run_local(config, storage=tmp_path, name="run", quiet=True)
    most = max(most, space.used_bytes(tmp_path))
    estimate = space.of_run(config, open_dataset(config.data)).total
    assert most <= estimate <= FACTOR * most


def test_the_formula_follows_the_network(smoke_config, digits):
    """Counted by hand for one layer's width: a checkpoint of MixMatch holds three values a parameter."""
    dataset = open_dataset(digits)
    small = replace(smoke_config, model=ModelConfig(depths=(1,), widths=(8,), projection_dim=8))
    # stem 3*8*9, block 2*8*8*9, three batch norms of 4*8 + 1 values (the last a 64-bit counter), head 8*10 + 10
    floats, counters = 3 * 8 * 9 + 2 * 8 * 8 * 9 + 3 * 4 * 8 + 90, 3
    weights = 4 * floats + 8 * counters
    split = 240 * 18
    projection = 4 * (8 * 8 + 8 + 4 * 8 + 8 * 8 + 8) + 8
    head = 4 * 90
    contrastive = weights - head + projection
    found = space.of_run(small, dataset)
    assert found.checkpoints == 3 * max(2 * contrastive, 3 * weights + split)
    assert found.stages == (weights - head) + weights + 2 * head
    assert found.exports == weights + (weights - head)


def test_a_run_without_room_is_refused_before_anything(smoke_config, tmp_path, full_disk):
    needed = space.of_run(smoke_config, open_dataset(smoke_config.data)).total
    full_disk(needed - 1)
    with pytest.raises(UserError) as caught:
        run_local(smoke_config, storage=tmp_path, name="run", quiet=True)
    assert "are free" in caught.value.what
    assert caught.value.where == tmp_path
    assert "--storage" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []

    full_disk(needed)
    earlier = tmp_path / "run" / "checkpoints" / "checkpoint_000000"
    earlier.mkdir(parents=True)
    (earlier / "part").write_bytes(bytes(1000))
    full_disk(needed - 1000)  # what is there is not written again
    assert run_local(smoke_config, storage=tmp_path, name="run", quiet=True) is not None
    full_disk(0)
    assert run_local(smoke_config, storage=tmp_path, name="run", quiet=True) is not None  # finished


def test_a_sweep_needs_room_for_all_of_its_runs(smoke_config, digits, tmp_path, full_disk):
    dataset = open_dataset(digits)
    one = space.of_run(smoke_config, dataset).total
    full_disk(3 * one)
    space.check_sweep([smoke_config] * 3, dataset, tmp_path)
    with pytest.raises(UserError, match="the sweep"):
        space.check_sweep([smoke_config] * 4, dataset, tmp_path)


def test_an_artefact_without_room_is_refused(digits, tmp_path, full_disk):
    data = TrainingSet(open_dataset(digits), np.arange(240) % 10, "")
    wide, narrow = LabelConsistent(rate=0.1), LabelConsistent(rate=0.05)
    assert narrow.disk_bytes(data) == 2 * 12 * (3 * 16 * 16 + 32)
    full_disk(space.of_craft(narrow, data))
    space.check_craft(narrow, data, tmp_path / "work")
    with pytest.raises(UserError, match="the artefact needs"):
        space.check_craft(wide, data, tmp_path / "work")
    full_disk(0)
    with pytest.raises(UserError, match="the artefact needs"):
        space.check_craft(Adaptive(), data, tmp_path / "work")


# -- data sets


@pytest.mark.parametrize("split", ["train", "test", "test_triggered"])
def test_a_file_of_images_is_as_large_as_its_formula(split, digits):
    dataset = open_dataset(digits)
    path, count = getattr(dataset, split), dataset.manifest.counts[split]
    assert path.stat().st_size == file_bytes(count, dataset.manifest.image_px)


def test_a_data_set_takes_no_more_than_its_formula(digits):
    counts, px = open_dataset(digits).manifest.counts, open_dataset(digits).manifest.image_px
    found = pipeline.space_bytes(counts["train"], counts["test"], px, has_attack=True)
    taken = space.used_bytes(digits)
    assert taken <= found <= 1.25 * taken  # small images: the preview is a sixth of it all, and compressed
