"""The run folder: what a run leaves on disk for people, reports and later runs (docs/design.md has the list)."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.io.hashes import sha256_file, sha256_json
from data_prep.io.json import read_json
from dbd_dist.config import TrainConfig
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.distributed.world import World
from dbd_dist.models.given import network_values
from dbd_dist.runtime import lock, logs, stopping
from dbd_dist.runtime.keys import method_hash
from dbd_dist.stages.flagged import Flagged

ERROR_FILE = "error.json"
"""What a worker leaves for its driver: a UserError, or that the run was stopped."""
RAY_FOLDER = "ray"
"""Ray Train's own files: metrics, and pointers to checkpoints. Read by nothing here."""


class _NoWriter:
    """In the place of a SummaryWriter that failed."""

    def add_scalar(self, *_: object) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class RunFolder:
    """One folder of one run; every method but the constructor is for rank 0 alone."""

    def __init__(self, path: Path):
        self.path = path
        self._tensorboard: Any = None
        self._rows: list[dict[str, Any]] = []
        self._behind = False
        """Whether metrics.jsonl lacks rows."""

    @property
    def progress(self) -> Path:
        return self.path / "progress.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def stop(self) -> Path:
        """A request to stop, for workers that no signal reaches."""
        return self.path / stopping.FILE

    def result(self) -> dict[str, Any] | None:
        """The stored result of a finished run."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"not a result ({error})", where=path, hint="choose another --name, or delete it"
            ) from error

    def tidy(self) -> None:
        """Remove what a command that was killed after the result had been written has left."""
        for path in (self.progress, self.stop, self.path / ERROR_FILE):
            path.unlink(missing_ok=True)
        lock.clear(self.path / lock.FILE)

    def claim(self, config: TrainConfig, dataset: Dataset) -> None:
        """Make the folder this run's, or find that it already is.

        Raises:
            UserError: the folder holds a run with another configuration or data set.
        """
        path = self.path / "run.json"
        if path.exists():
            try:
                stored = read_json(path)
                theirs = (str(stored["config_hash"]), str(stored["data_hash"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError("not a run description", where=path, hint="choose another --name") from error
            if method_hash(config) not in (theirs[0], _hash_of(stored)):
                raise UserError(
                    "this run exists with another configuration",
                    where=self.path,
                    expected="the same configuration, to resume it",
                    hint="choose another --name, or delete the folder",
                )
            if theirs[1] != dataset.manifest.data_hash:
                raise UserError(
                    f"this run was made on data {theirs[1][:12]}, not {dataset.manifest.data_hash[:12]}"
                    f" ({dataset.folder})",
                    where=self.path,
                    hint="choose another --name, or delete the folder",
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(
            path,
            {
                "config": config.to_dict(),
                "titles": config.method.titles(),
                "config_hash": method_hash(config),
                "dataset": dataset.manifest.name,
                "data_hash": dataset.manifest.data_hash,
                "versions": versions(),
                "commit": commit(),
                "host": host(),
                "command": sys.argv,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )

    # -- figures of an epoch

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, of one stage or of all."""
        return [dict(row) for row in self._rows if stage is None or row["stage"] == stage]

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Make these all rows there are, in metrics.jsonl and in the event files: those that a state was saved with.

        What a killed run logged after the checkpoint that it resumes from is thereby gone.
        """
        self._rows = [dict(row) for row in rows]
        self._behind = True
        self.write_rows()
        self._tensorboard = None
        if (self.path / "tensorboard").exists():
            shutil.rmtree(self.path / "tensorboard")
        for row in self._rows:
            self._curve(row)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl and to the event files (steps there are epochs of the stage).

        Storage that cannot be written now is caught up with later: rows are kept in memory, and in every state.
        """
        self._rows.append(row)
        try:
            if self._behind:
                self.write_rows()
            else:
                with open(self.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
        except OSError as error:
            self._behind = True
            logs.event("metrics.jsonl cannot be written now", level=logging.WARNING, why=str(error))
        if row["epoch"] == row["epochs"]:
            logs.event(
                "stage is reused" if row.get("reused") else "stage ends", stage=row["stage"], loss=row.get("loss")
            )
        self._curve(row)

    def write_rows(self) -> None:
        """Write metrics.jsonl anew.

        Raises:
            OSError
        """
        aside = self.path / ".metrics.jsonl"
        try:
            aside.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
            os.replace(aside, self.path / "metrics.jsonl")
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        self._behind = False

    def _curve(self, row: dict[str, Any]) -> None:
        try:
            self._add_scalars(row)
        except OSError as error:  # curves are in metrics.jsonl too: no reason to end a run, nor to try again
            logs.event("event files cannot be written", level=logging.WARNING, why=str(error))
            self._tensorboard = _NoWriter()

    def _add_scalars(self, row: dict[str, Any]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard.writer import SummaryWriter  # half a second to import

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        for name, value in row.items():
            if isinstance(value, int | float) and name not in ("epoch", "epochs", "reused"):
                self._tensorboard.add_scalar(f"{row['stage']}/{name}", value, row["epoch"])
        self._tensorboard.flush()

    def last_checkpoint(self) -> str | None:
        """Up to where metrics.jsonl goes, for people: "mixmatch, epoch 3"."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
            row = json.loads([line for line in lines if line.endswith("\n")][-1])
        except (OSError, ValueError, IndexError):
            return None
        return f"about {row['stage']}, epoch {row['epoch']}"

    # -- results

    def write_split(self, split: dict[str, Tensor]) -> None:
        """split.parquet: the split: loss and label kept of every training sample."""
        self._write_columns("split.parquet", split)

    def write_flagged(self, flagged: Flagged) -> None:
        """flagged.parquet: what a detector flagged of the training samples, and its scores where it has any."""
        if flagged["samples"] is None:
            return
        columns = {"flagged": flagged["samples"]}
        if flagged["scores"] is not None:
            columns["score"] = flagged["scores"]
        self._write_columns("flagged.parquet", columns)

    def write_triggers(self, triggers: Tensor, flagged: Flagged) -> None:
        """triggers.npz and triggers.png: mask and pattern of each class, float16 (K, 4, H, W), and their picture."""
        from dbd_dist.runtime.pictures import trigger_sheet

        scores, classes = flagged["class_scores"], flagged["classes"]
        assert scores is not None
        assert classes is not None
        aside = self.path / ".triggers.npz"
        np.savez_compressed(aside, triggers=triggers.to(torch.float16).numpy(), scores=scores.numpy())
        os.replace(aside, self.path / "triggers.npz")
        aside = self.path / ".triggers.png"
        trigger_sheet(triggers, scores, classes.tolist()).save(aside, optimize=True)
        os.replace(aside, self.path / "triggers.png")

    def _write_columns(self, name: str, columns: dict[str, Tensor]) -> None:
        """A Parquet table over the training samples: their index, and a value of each in every column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        count = len(next(iter(columns.values())))
        table = pa.table({"index": np.arange(count), **{column: values.numpy() for column, values in columns.items()}})
        aside = self.path / f".{name}"
        pq.write_table(table, aside)
        os.replace(aside, self.path / name)

    def write_features(self, positions: Tensor, features: Tensor, kind: str) -> None:
        """features.npz: (n,) sample indices and their (n, d) penultimate features."""
        aside = self.path / ".features.npz"
        np.savez(aside, index=positions.numpy(), features=features.to(torch.float16).numpy(), kind=np.array(kind))
        os.replace(aside, self.path / "features.npz")

    def write_model(
        self, state: dict[str, Tensor], config: TrainConfig, dataset: Dataset, normalise: AugmentConfig
    ) -> None:
        """model.safetensors and model.json: the weights, and how to rebuild the network and normalise its input."""
        classes = {"class_names": list(dataset.manifest.class_names)}
        self._export("model", state, config, dataset, normalise, classes)

    def write_backbone(
        self, state: dict[str, Tensor], config: TrainConfig, dataset: Dataset, normalise: AugmentConfig
    ) -> None:
        """backbone.safetensors and backbone.json: the same of the self-supervised backbone, which knows no classes."""
        self._export("backbone", state, config, dataset, normalise, {})

    def _export(
        self,
        stem: str,
        state: dict[str, Tensor],
        config: TrainConfig,
        dataset: Dataset,
        normalise: AugmentConfig,
        more: dict[str, Any],
    ) -> None:
        from safetensors.torch import save

        weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        aside, path = self.path / f".{stem}.safetensors", self.path / f"{stem}.safetensors"
        aside.write_bytes(save(weights))
        description = {
            "network": network_values(config.model),
            **more,
            "image_px": dataset.manifest.image_px,
            "input": "RGB in 0-1, minus mean, over std",
            "mean": list(normalise.mean),
            "std": list(normalise.std),
            "weights": {"bytes": aside.stat().st_size, "sha256": sha256_file(aside)},
        }
        path.with_suffix(".json").unlink(missing_ok=True)  # a kill in between leaves no description of other weights
        os.replace(aside, path)
        write_json(path.with_suffix(".json"), description | {"checksum": sha256_json(description)})

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / "result.json", result)
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()


def _hash_of(stored: dict[str, Any]) -> str | None:
    """The hash of a stored configuration as it is computed today; None where it is of no use."""
    try:
        return method_hash(TrainConfig.from_dict(stored["config"]))
    except UserError:
        return None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write to a temporary file and rename it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(aside, path)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for package in ("dbd-dist", "torch", "torchvision", "ray", "ffcv", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def commit() -> str | None:
    """The commit of the code, with a "+" where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def host() -> dict[str, Any]:
    """The machine, without its name."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count(), "gpus": gpus}


def describe(world: World, config: TrainConfig, bf16: bool) -> dict[str, Any]:
    """What a run computed on, for its result."""
    machine = host()
    return {
        "device": machine["gpus"][0] if world.device.type == "cuda" else f"{machine['cpu']}, {machine['cores']} cores",
        "world_size": world.size,
        "precision": "bf16" if bf16 else "fp32",
        "versions": versions(),
        "commit": commit(),
    }
