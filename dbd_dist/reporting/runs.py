"""Run folders, read from disk.

An unfinished run lacks files: that is no error, and the reader says why they are missing. A file that is there and
cannot be what it should be is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.io.json import read_json
from data_prep.io.limits import JSON_BYTES, read_limited
from dbd_dist.reporting import names
from dbd_dist.reporting.arrays import LARGEST, Features, Split, read_features, read_split
from dbd_dist.reporting.wording import printable

_FRACTIONS = ("clean_acc", "asr", "robust_acc", "asr_untriggered")
_COUNTS = ("kept", "kept_poisoned", "poisoned", "train_size", "world_size", "seed")
_RATES = ("tpr", "fpr", "auroc", "class_tpr", "class_fpr")
"""Of what a detector flagged."""
_OPTIONAL = ("result.json", "split.parquet", "features.npz")
_RANKING = "ranking.parquet"
_MOST = 2**64
"""Counts and seeds are no larger."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    description: Mapping[str, Any]
    """run.json."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl, each with its stage and epoch."""
    left_out: int
    """Lines of metrics.jsonl with figures that no training can give."""
    result: Mapping[str, Any] | None
    """result.json; None while there is none."""
    split: Split | None
    ranking: Split | None
    """The split that a run would have begun with that splits nothing (`ssl-ce`, `ssl-sce`); its first is its last."""
    features: Features | None
    files: frozenset[str]
    """Which of `_OPTIONAL` are there."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.description["config"]

    @property
    def method(self) -> str:
        return str(self.config.get("method") or (self.result or {}).get("method") or "unknown")

    @property
    def defends(self) -> bool:
        return names.defends(self.method, self.result or {})

    @property
    def changes_input(self) -> bool:
        return names.changes_input(self.method, self.result or {})

    def title(self, name: str | None = None) -> str:
        """Of the method, or of one of its stages."""
        return names.title(self.method if name is None else name, self.description)

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        recorded = (self.result or {}).get("dataset") or self.description.get("dataset")
        return str(recorded or "unknown data")

    @property
    def data_hash(self) -> str | None:
        return self.description.get("data_hash")

    @property
    def state(self) -> str:
        """What a run without a result was doing when it last wrote."""
        if self.result is not None:
            return "finished"
        if not self.metrics:
            return "has not finished an epoch"
        last = self.metrics[-1]
        return f"not finished: epoch {last['epoch']} of {last.get('epochs', '?')} in {last['stage']}"

    @property
    def stages(self) -> list[str]:
        """Stages that have reported, in the order in which they ran."""
        return list(dict.fromkeys(row["stage"] for row in self.metrics))

    @property
    def missing(self) -> dict[str, str]:
        """Why a file is not there, by its name."""
        reason = "the run did not write it" if self.result else "the run has no result yet"
        missing = {name: reason for name in _OPTIONAL if name not in self.files}
        if "split.parquet" in missing and not self.defends:
            missing["split.parquet"] = "a run without defence ranks no samples"
        elif "split.parquet" in missing and self.result and self.result.get("kept") is None:
            missing["split.parquet"] = "the method ranks no samples"
        return missing


def load_run(folder: Path, *, arrays: bool = True) -> Run:
    """Read a run folder.

    Args:
        folder: with a run.json.
        arrays: read the split and the features too, which tables do not need.

    Raises:
        UserError: no such folder, no run folder, or a damaged file in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("there is no such run folder", where=folder, hint="name the folder that `dbd train` printed")
    path = folder / "run.json"
    if not path.is_file():
        raise UserError(
            "not a run folder: there is no run.json", where=folder, expected="a folder that `dbd train` made"
        )
    description = _object(path)
    if not isinstance(description.get("config"), dict):
        raise UserError("not a run description: there is no object `config`", where=path)
    files = frozenset(name for name in _OPTIONAL if (folder / name).exists())
    metrics, left_out = _metrics(folder / "metrics.jsonl")
    return Run(
        folder=folder,
        description=description,
        metrics=metrics,
        left_out=left_out,
        result=_result(folder / "result.json") if "result.json" in files else None,
        split=read_split(folder / "split.parquet") if arrays and "split.parquet" in files else None,
        ranking=read_split(folder / _RANKING) if arrays and (folder / _RANKING).exists() else None,
        features=read_features(folder / "features.npz") if arrays and "features.npz" in files else None,
        files=files,
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise UserError(f"damaged: not JSON ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UserError("damaged: not a JSON object", where=path)
    return values


def _is_number(value: Any, most: float = LARGEST) -> bool:
    """A number from 0 to `most`; integers of any length are compared exactly."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _result(path: Path) -> dict[str, Any]:
    """result.json, each field that a report computes with checked."""
    result = _object(path)

    def check(field: str, fits: bool, expected: str) -> None:
        if not fits:
            raise UserError(f"field {field} is {printable(result.get(field))!r}", where=path, expected=expected)

    for field in ("method", "dataset"):
        check(field, isinstance(result.get(field), str), "a string")
    for field in ("attack", "preset"):
        check(field, isinstance(result.get(field), str | None), "a string, or null")
    for field in _FRACTIONS:
        value = result.get(field)
        check(field, _is_number(value, 1) or (value is None and field != "clean_acc"), "a fraction from 0 to 1")
    for field in _COUNTS:
        value = result.get(field)
        fits = value is None or (isinstance(value, int) and _is_number(value, _MOST))
        check(field, fits, f"a whole number from 0 to {_MOST}, or null")
    flagged = result.get("flagged")
    check("flagged", flagged is None or _is_flagged(flagged), "an object of counts, and of fractions from 0 to 1")
    classes, seconds = result.get("per_class_acc"), result.get("seconds")
    fits = isinstance(classes, list) and all(value is None or _is_number(value, 1) for value in classes)
    check("per_class_acc", fits or classes is None, "a list of fractions from 0 to 1")
    fits = isinstance(seconds, dict) and all(map(_is_number, seconds.values()))
    check("seconds", fits or seconds is None, "an object of seconds by stage")
    return result


def _is_flagged(flagged: Any) -> bool:
    """Can it be what a detector flagged (`Evaluator.count_flagged`)?"""
    if not isinstance(flagged, dict) or not isinstance(flagged.get("classes"), list | None):
        return False
    count, classes = flagged.get("samples"), flagged.get("classes") or []
    if not all(isinstance(value, int) and _is_number(value) for value in [*classes, count or 0]):
        return False
    return all(flagged.get(name) is None or _is_number(flagged[name], 1) for name in _RATES)


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of metrics.jsonl, and how many were left out for figures that no training can give."""
    rows, left_out = [], 0
    lines = _lines(path) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)  # a loss may be NaN here: the run stopped at it
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # incomplete: the run was killed while it wrote, or is writing now
                break
            raise UserError("damaged: not JSON", where=f"{path}, line {number}") from error
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("epoch"), int):
            raise UserError("damaged: a report without stage or epoch", where=f"{path}, line {number}")
        if any(_is_beyond(value) for value in row.values()):
            left_out += 1
        else:
            rows.append(row)
    return rows, left_out


def _is_beyond(value: Any) -> bool:
    return isinstance(value, int | float) and LARGEST < abs(value) < math.inf


def _lines(path: Path) -> list[str]:
    try:
        lines = read_limited(path, JSON_BYTES).decode().replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({getattr(error, 'strerror', None) or error})", where=path) from error
    return lines[:-1] if lines[-1] == "" else lines
