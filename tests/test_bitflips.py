"""One flipped bit anywhere in what is kept is found before anything of it is used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.artefacts import read_artefact, write_artefact
from data_prep.attacks import BadNets
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist.config import TrainConfig
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.exported import read_exported
from dbd_dist.models.heads import Classifier
from dbd_dist.runtime.run_folder import RunFolder

JSON = ("manifest.json", "artefact.json", "model.json", "backbone.json")
TEXT_CASES = 150
BINARY_CASES = 12


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A data set, an artefact and a run's exported networks, all tiny."""
    root = tmp_path_factory.mktemp("kept")
    config = PrepareConfig(
        source=Digits(train_per_class=2, test_per_class=1), attack=BadNets(), rate=0.2, out=root / "data", workers=1
    )
    dataset = prepare(config, progress=False)
    arrays = {"pattern": np.arange(192, dtype=np.uint8).reshape(8, 8, 3), "mask": np.full((8, 8), 26, np.uint8)}
    write_artefact(
        root / "artefact", "adaptive", arrays, image_px=8, target=3, fingerprint="f" * 64,
        settings={"lr": 1e-05, "name": "é\x1b"}, evidence={"before": 0.5}, versions={"numpy": "2"},
    )  # fmt: skip
    train = TrainConfig(model=ModelConfig(depths=(1,), widths=(4,), projection_dim=2))
    run, network = RunFolder(root / "run"), Classifier(train.model, 10)
    run.path.mkdir()
    run.write_model(network.state_dict(), train, dataset, train.normalise)
    run.write_backbone(network.backbone.state_dict(), train, dataset, train.normalise)
    return {"data": root / "data", "artefact": root / "artefact", "run": run.path}


def read(kind: str, folder: Path, name: str) -> Any:
    """All that a file is used for, as values that can be compared."""
    if kind == "data":
        return open_dataset(folder).manifest
    if kind == "artefact":
        artefact = read_artefact(folder, "adaptive")
        return {**vars(artefact), "folder": None, "arrays": {n: a.tobytes() for n, a in artefact.arrays.items()}}
    exported = read_exported(folder / f"{Path(name).stem}.safetensors")
    return {**vars(exported), "weights": exported.weights.read_bytes()}


def files(kind: str) -> list[str]:
    return {
        "data": ["manifest.json", "train.beton", "test.beton", "test_triggered.beton", "samples.parquet",
                 "truth.parquet", "preview.png"],
        "artefact": ["artefact.json", "artefact.npz"],
        "run": ["model.json", "model.safetensors", "backbone.json", "backbone.safetensors"],
    }[kind]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in ("data", "artefact", "run") for n in files(k)])
def test_a_flipped_bit_is_found(kind: str, name: str, kept, tmp_path):
    folder = Path(shutil.copytree(kept[kind], tmp_path / kind))
    assert sorted(p.name for p in folder.iterdir()) == sorted(files(kind))
    path = folder / name
    whole, clean = path.read_bytes(), read(kind, folder, name)

    def refuses_or_means_the_same(position: int) -> bool:
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            same = read(kind, folder, name) == clean
        except UserError:
            return True
        # JSON writes some values in two ways, which a bit lies between: 1e-05 and 1E-05
        assert name in JSON, f"bit {position} was not found"
        assert same, f"bit {position} changed what is used"
        assert chr(flipped[position // 8]).lower() == chr(whole[position // 8]).lower()
        return False

    cases = TEXT_CASES if name in JSON else BINARY_CASES

    @settings(
        max_examples=cases, derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )  # fmt: skip
    @given(st.integers(0, 8 * len(whole) - 1))
    def flip(position: int) -> None:
        refuses_or_means_the_same(position)

    flip()
    # hypothesis tries small numbers first; these are spread evenly
    rng = random.Random(name)
    found = [refuses_or_means_the_same(rng.randrange(8 * len(whole))) for _ in range(cases)]
    assert np.mean(found) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("artefact", "artefact.json"), ("run", "model.json"), ("run", "backbone.json")]
)
def test_every_bit_of_a_description(kind: str, name: str, kept, tmp_path):
    folder = Path(shutil.copytree(kept[kind], tmp_path / kind))
    path = folder / name
    whole, clean = path.read_bytes(), read(kind, folder, name)
    missed = 0
    for position in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert read(kind, folder, name) == clean, position
            missed += 1
        except UserError:
            pass
    assert missed < 10
