"""The run folder: what a run leaves on disk for people, reports and later runs (docs/design.md has the list)."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.atomic import replacing
from data_prep.io.hashes import sha256_file
from data_prep.io.json import read_json, sealed, write_json
from dbd_dist.config import TrainConfig
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.models.given import network_values
from dbd_dist.runtime import logs, stopping
from dbd_dist.runtime.keys import method_hash
from dbd_dist.runtime.machine import commit, host, versions
from dbd_dist.stages.flagged import Flagged

RUN_FILE = "run.json"
ERROR_FILE = "error.json"
"""What a worker leaves for its driver: a UserError, or that the run was stopped."""
RAY_FOLDER = "ray"
"""Ray Train's own files: metrics, and pointers to checkpoints. Read by nothing here."""
STARTED_FILE = "started"
"""In Ray's folder of a run: its workers have come to our code."""
_MEASURED = (
    "clean_acc", "asr", "robust_acc", "asr_untriggered", "split_quality", "feature_quality", "after_warmup", "flagged",
    "measures",
)  # fmt: skip
"""Fields of a result that the event files show, too."""


class _NoEvents:
    """In the place of an event file that failed."""

    def add_scalars(self, *_: object) -> None: ...

    def close(self) -> None: ...


class RunFolder:
    """One folder of one run; every method but the constructor is for rank 0 alone."""

    def __init__(self, path: Path):
        self.path = path
        self._place: tuple[int, int] | None = None
        """Device and inode of the folder that is held."""
        self._claim: bytes | None = None
        """Its run.json, which names it where a storage that comes back gives it other numbers."""
        self._events: Any = None
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
        path = self.path / RUN_FILE
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
            indent=2,
        )

    # -- the folder itself

    def hold(self) -> None:
        """Note which folder this is, made where it is missing; from now on nothing is written to another one.

        Raises:
            OSError: it cannot be made; or as `check`, where it is held already.
        """
        if self._place is None:
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                self._claim = (self.path / RUN_FILE).read_bytes()
            self._place = _place(self.path)
        self.check()

    def check(self) -> None:
        """Before whatever is written: is the folder the one that is held?

        A folder is deleted, a storage renamed or unmounted; what is written then lies where nobody looks, or in
        somebody else's run, and the lock is on something else.

        Raises:
            OSError: the folder is gone, or another is in its place, for now.
        """
        if self._place is None:
            return
        found, claim = None, None
        with suppress(FileNotFoundError, NotADirectoryError):
            found = _place(self.path)
            if found == self._place:
                return
            claim = (self.path / RUN_FILE).read_bytes()
        if claim is None or claim != self._claim:
            raise OSError(errno.ESTALE, "the run's folder is gone, or another is in its place", str(self.path))
        self._place = found

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """`replacing` for a file of the folder."""
        self.check()
        with replacing(self.path / name) as partial:
            yield partial

    def _write_json(self, name: str, values: dict[str, Any]) -> None:
        self.check()
        write_json(self.path / name, values, indent=2)

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
        self._events = None
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
            self.check()
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
        with self._replacing("metrics.jsonl") as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._behind = False

    def _curve(self, row: dict[str, Any]) -> None:
        values = {
            f"{row['stage']}/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("epoch", "epochs", "reused")
        }
        self._add_scalars(values, row["epoch"])

    def curve_of_result(self, result: dict[str, Any]) -> None:
        """A point of every measure of the result in the event files."""
        measures = {name: result[name] for name in _MEASURED if result.get(name) is not None}
        self._add_scalars(dict(_numbers(measures, "result")), self._rows[-1]["epoch"] if self._rows else 0)

    def _add_scalars(self, values: dict[str, float], step: int) -> None:
        try:
            if self._events is None:
                from dbd_dist.runtime.event_file import EventFile  # half a second to import

                self.check()
                self._events = EventFile(self.path / "tensorboard")
            self._events.add_scalars(values, step)
        except OSError as error:  # they are in other files too: no reason to end a run, nor to try again
            logs.event("event files cannot be written", level=logging.WARNING, why=str(error))
            self._events = _NoEvents()

    def last_checkpoint(self) -> str | None:
        """Up to where metrics.jsonl goes, for people: "mixmatch, epoch 3"."""
        try:
            lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
            row = json.loads([line for line in lines if line.endswith("\n")][-1])
            return f"about {row['stage']}, epoch {row['epoch']}"
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            return None

    # -- results

    def write_split(self, split: dict[str, Tensor]) -> None:
        """split.parquet: the split: loss and label kept of every training sample."""
        self._write_columns("split.parquet", split)

    def write_ranking(self, split: dict[str, Tensor]) -> None:
        """ranking.parquet: as split.parquet, of a run that ranks samples and splits nothing."""
        self._write_columns("ranking.parquet", split)

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
        arrays = {"triggers": triggers.to(torch.float16).numpy(), "scores": scores.numpy()}
        with self._replacing("triggers.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        with self._replacing("triggers.png") as partial:
            trigger_sheet(triggers, scores, classes.tolist()).save(partial, format="PNG", optimize=True)

    def _write_columns(self, name: str, columns: dict[str, Tensor]) -> None:
        """A Parquet table over the training samples: their index, and a value of each in every column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        count = len(next(iter(columns.values())))
        table = pa.table({"index": np.arange(count), **{column: values.numpy() for column, values in columns.items()}})
        with self._replacing(name) as partial:
            pq.write_table(table, partial)

    def write_features(self, positions: Tensor, features: Tensor, kind: str) -> None:
        """features.npz: (n,) sample indices and their (n, d) penultimate features."""
        arrays = {"index": positions.numpy(), "features": features.to(torch.float16).numpy(), "kind": np.array(kind)}
        with self._replacing("features.npz") as partial, partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

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
        with self._replacing(f"{stem}.safetensors") as partial:
            partial.write_bytes(save(weights))
            description = {
                "network": network_values(config.model),
                **more,
                "image_px": dataset.manifest.image_px,
                "input": "RGB in 0-1, minus mean, over std",
                "mean": list(normalise.mean),
                "std": list(normalise.std),
                "weights": {"bytes": partial.stat().st_size, "sha256": sha256_file(partial)},
            }
            # a kill in between leaves no description of other weights
            (self.path / f"{stem}.json").unlink(missing_ok=True)
        self._write_json(f"{stem}.json", sealed(description))

    def write_result(self, result: dict[str, Any]) -> None:
        self._write_json("result.json", result)
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The numbers inside, by their path; a pair [N, number] of a list is called N."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for pair in value:
            if isinstance(pair, list | tuple) and len(pair) == 2:
                yield from _numbers(pair[1], f"{name}/{pair[0]}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _place(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _hash_of(stored: dict[str, Any]) -> str | None:
    """The hash of a stored configuration as it is computed today; None where it is of no use."""
    try:
        return method_hash(TrainConfig.from_dict(stored["config"]))
    except (UserError, KeyError):
        return None
