"""Run folders as a training would leave them, made in a moment: a data set of tiny images and drawn losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.attacks import BadNets, NoAttack
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Dataset
from data_prep.dataset.truth import read_truth
from data_prep.pipeline import prepare
from data_prep.sources import ImageFolder

CLASSES = ("<script>b", "disc", "moon\u202egnp", "star $x$")
"""In order; as a hostile owner could name them ("/" cannot be part of a folder's name)."""
PX = 16
PER_CLASS = 30


def _images(root: Path) -> Path:
    rng = np.random.default_rng(3)
    for split, count in (("train", PER_CLASS), ("test", 5)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (PX, PX, 3), dtype=np.uint8)
                pixels[..., number % 3] += 100
                Image.fromarray(pixels).save(folder / f"{name}-{i:02d} & co.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class folders, 120 training and 20 test images."""
    return _images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def poisoned(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """10 % under BadNets, target 0."""
    config = PrepareConfig(
        source=ImageFolder(root=images, image_px=PX, resize_px=PX),
        attack=BadNets(),
        rate=0.1,
        target=0,
        datasets=tmp_path_factory.mktemp("data"),
    )
    return prepare(config, progress=False)


@pytest.fixture(scope="session")
def untrusted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same images with nobody's word on them."""
    config = PrepareConfig(
        source=ImageFolder(root=images, image_px=PX, resize_px=PX),
        attack=NoAttack(),
        untrusted=True,
        datasets=tmp_path_factory.mktemp("data"),
    )
    return prepare(config, progress=False)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a made-up run found."""

    method: str = "dbd"
    seed: int = 0
    clean_acc: float = 0.972
    asr: float | None = 0.0
    finished: bool = True


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder; returns it."""

    def make(dataset: Dataset, name: str | None = None, **spec: Any) -> Path:
        wanted = Spec(**spec)
        folder = tmp_path / "runs" / (name or f"{wanted.method}-s{wanted.seed}")
        folder.mkdir(parents=True)
        write_run(folder, dataset, wanted)
        return folder

    return make


def write_run(folder: Path, dataset: Dataset, spec: Spec) -> None:
    """Every file that a report reads."""
    manifest = dataset.manifest
    n, rng = manifest.counts["train"], np.random.default_rng(spec.seed)
    truth = read_truth(dataset.folder)["train"] if "truth.parquet" in manifest.files else None
    bad = np.zeros(n, dtype=bool) if truth is None else truth.poisoned
    config = {
        "preset": "made-up", "method": spec.method, "data": str(dataset.folder), "seed": spec.seed,
        "model": {"widths": [16, 32]}, "split": {"keep": 0.5},
    }  # fmt: skip
    (folder / "run.json").write_text(
        json.dumps(
            {
                "config": config, "config_hash": "c0ffee", "dataset": manifest.name, "data_hash": manifest.data_hash,
                "versions": {"python": "3.11", "torch": "2.14"}, "commit": "abc123", "host": {"cpu": "a <b>CPU</b>"},
                "started": "2026-01-01T00:00:00+00:00",
            }
        )
    )  # fmt: skip
    stages = {"supervised": 6} if spec.method == "none" else {"simclr": 5, "warmup": 3, "mixmatch": 6}
    if not spec.finished:
        stages = dict(list(stages.items())[:1])
    lines = []
    for stage, epochs in stages.items():
        for epoch in range(1, epochs + 1):
            row: dict[str, Any] = {"stage": stage, "epoch": epoch, "epochs": epochs, "loss": 3.0 / epoch + 0.2}
            if stage in ("mixmatch", "supervised") and epoch % 2 == 0:
                row["clean_acc"] = spec.clean_acc * epoch / epochs
                if spec.asr is not None:
                    row["asr"] = spec.asr * epoch / epochs
            if stage == "mixmatch" and truth is not None:
                row |= {"kept": n // 2, "kept_poisoned": 0, "poisoned": int(bad.sum())}
            lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if not spec.finished:
        return
    first = rng.gamma(2.0, 0.8, n) + bad * 4.0
    last = rng.gamma(1.0, 0.3, n) + bad * 7.5
    kept = {}
    for column, loss in (("first_kept", first), ("kept", last)):
        kept[column] = np.zeros(n, dtype=bool)
        kept[column][np.argsort(loss)[: n // 2]] = True
    if spec.method != "none":
        columns = {"index": np.arange(n), "loss": last.astype(np.float32), "kept": kept["kept"]}
        columns |= {"first_loss": first.astype(np.float32), "first_kept": kept["first_kept"]}
        if spec.method in ("ssl-ce", "ssl-sce"):  # which rank samples and split nothing
            columns |= {"loss": columns["first_loss"], "kept": columns["first_kept"]}
        name = "ranking" if spec.method in ("ssl-ce", "ssl-sce") else "split"
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    true = rng.integers(0, manifest.num_classes, n) if truth is None else truth.true_label
    centres = np.random.default_rng(9).normal(0, 3, (manifest.num_classes + 1, 12))
    place = true if spec.method != "none" else np.where(bad, manifest.num_classes, true)
    features = centres[place] + rng.normal(0, 1, (n, 12))
    kind = np.array("supervised" if spec.method == "none" else "ssl")
    np.savez(folder / "features.npz", index=np.arange(n), features=features.astype(np.float16), kind=kind)
    result = {
        "method": spec.method, "preset": "made-up", "dataset": manifest.name, "data_hash": manifest.data_hash,
        "attack": manifest.attack["kind"], "seed": spec.seed, "clean_acc": spec.clean_acc,
        "per_class_acc": [spec.clean_acc] * manifest.num_classes, "asr": spec.asr,
        "robust_acc": None if spec.asr is None else 1 - spec.asr,
        "kept": None if spec.method == "none" else n // 2,
        "kept_poisoned": None if spec.method == "none" or truth is None else int((kept["kept"] & bad).sum()),
        "poisoned": None if truth is None else int(bad.sum()), "train_size": n,
        "seconds": dict.fromkeys(stages, 12.5), "world_size": 2, "device": "a CPU", "precision": "fp32",
        "versions": {}, "commit": "abc123",
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
