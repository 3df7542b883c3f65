"""Run folders and the data sets they were trained on, read from disk.

A run that is still going lacks files: that is no error, and the reader says why they are missing. A file that is
there and
cannot be what it should be is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset.manifest import Manifest, read_manifest
from data_prep.dataset.samples import FILE as SAMPLES
from data_prep.dataset.samples import read_samples
from data_prep.dataset.truth import FILE as TRUTH
from data_prep.dataset.truth import SplitTruth, read_truth
from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.io.hashes import sha256_file
from data_prep.io.json import read_json
from data_prep.io.limits import JSON_BYTES, TABLE_ROWS, refuse_pipes
from dbd_dist.reporting import settings, tables

_FRACTIONS = ("clean_acc", "asr", "robust_acc")
_COUNTS = ("kept", "kept_poisoned", "poisoned", "train_size", "world_size", "seed")


@dataclass(frozen=True)
class Split:
    """What the filter made of every training sample, in index order: arrays (n,)."""

    loss: np.ndarray
    """float64: SCE loss in the last split."""
    kept: np.ndarray
    """bool: its label was used."""
    first_loss: np.ndarray
    """float64: in the split right after the warm-up."""
    first_kept: np.ndarray
    """bool."""


@dataclass(frozen=True)
class Features:
    """Penultimate features of some training samples."""

    index: np.ndarray
    """int64 (n,): which samples."""
    features: np.ndarray
    """float32 (n, d)."""
    kind: str
    """"ssl" or "supervised": how the backbone was trained."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    description: Mapping[str, Any]
    """run.json."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""
    result: Mapping[str, Any] | None
    """result.json; None while the run is going."""
    split: Split | None
    features: Features | None
    missing: Mapping[str, str]
    """Why a file is not there, by its name."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.description["config"]

    @property
    def method(self) -> str:
        return str(self.config.get("method") or (self.result or {}).get("method") or "unknown")

    @property
    def seed(self) -> int | None:
        seed = self.config.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(
            (self.result or self.description).get("dataset") or self.description.get("dataset") or "unknown data"
        )

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
    description = _json(path)
    if not isinstance(description.get("config"), dict):
        raise UserError("not a run description: there is no object `config`", where=path)
    result_path = folder / "result.json"
    result = _result(result_path) if result_path.exists() else None
    metrics = _metrics(folder / "metrics.jsonl")
    missing = {}
    defended = description["config"].get("method") != "none"
    going = "the run has no result yet" if result is None else "the run did not write it"
    if result is None:
        missing["result.json"] = "the run is still going, or was stopped"
    split = features = None
    if not (folder / "split.parquet").exists():
        missing["split.parquet"] = going if defended else "a run without defence ranks no samples"
    elif arrays:
        split = _split(folder / "split.parquet")
    if not (folder / "features.npz").exists():
        missing["features.npz"] = going
    elif arrays:
        features = _features(folder / "features.npz")
    return Run(
        folder=folder,
        description=description,
        metrics=metrics,
        result=result,
        split=split,
        features=features,
        missing=missing,
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error
    except ValueError as error:
        raise UserError(f"damaged: not JSON ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UserError("damaged: not a JSON object", where=path)
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _result(path: Path) -> dict[str, Any]:
    result = _json(path)

    def bad(field: str, expected: str) -> UserError:
        return UserError(f"field {field} is {str(result.get(field))[:80]!r}", where=path, expected=expected)

    for field in ("method", "dataset"):
        if not isinstance(result.get(field), str):
            raise bad(field, "a string")
    for field in ("attack", "preset"):
        if not isinstance(result.get(field), str | None):
            raise bad(field, "a string, or null")
    for field in _FRACTIONS:
        value = result.get(field)
        if (value is not None or field == "clean_acc") and not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
            raise bad(field, "a fraction from 0 to 1")
    for field in _COUNTS:
        value = result.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise bad(field, "a whole number from 0, or null")
    classes = result.get("per_class_acc")
    if classes is not None and not (
        isinstance(classes, list) and all(v is None or (_is_number(v) and 0 <= v <= 1) for v in classes)
    ):
        raise bad("per_class_acc", "a list of fractions from 0 to 1")
    seconds = result.get("seconds")
    if seconds is not None and not (
        isinstance(seconds, dict) and all(_is_number(v) and v >= 0 for v in seconds.values())
    ):
        raise bad("seconds", "an object of seconds by stage")
    return result


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        refuse_pipes(path)
        if path.stat().st_size > JSON_BYTES:
            raise UserError(f"{path.stat().st_size:,} bytes", where=path, expected=f"at most {JSON_BYTES:,}")
        lines = path.read_text(encoding="utf-8").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=path) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)  # a loss may be NaN here: the run stopped at it
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # torn: the run was killed while it wrote, or is writing now
                break
            raise UserError("damaged: not JSON", where=f"{path}, line {number}") from error
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("epoch"), int):
            raise UserError("damaged: a report without stage or epoch", where=f"{path}, line {number}")
        rows.append(row)
    return rows


def _split(path: Path) -> Split:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def bad(what: str) -> UserError:
        return UserError(f"damaged: {what}", where=path)

    try:
        refuse_pipes(path)
        file = pq.ParquetFile(path)
        names, schema = file.schema_arrow.names, file.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise bad(f"not a table ({error})") from error
    if file.metadata.num_rows > TABLE_ROWS:
        raise bad(f"{file.metadata.num_rows:,} rows")
    columns = {}
    for name, holds in (
        ("index", pa.types.is_integer),
        ("loss", pa.types.is_floating),
        ("kept", pa.types.is_boolean),
        ("first_loss", pa.types.is_floating),
        ("first_kept", pa.types.is_boolean),
    ):
        if names.count(name) != 1 or not holds(schema.field(name).type):
            raise bad(f"no column {name!r} of its type")
        try:
            table = file.read(columns=[name])
        except (pa.ArrowException, OSError, MemoryError) as error:
            raise bad(f"not a table ({error})") from error
        if table.column(name).null_count:
            raise bad(f"column {name!r} holds nulls")
        columns[name] = table.column(name).to_numpy()
    index = columns.pop("index")
    order = np.argsort(index, kind="stable")
    if len(index) == 0 or not np.array_equal(index[order], np.arange(len(index))):
        raise bad("the indices are not 0 to n - 1")
    for name in ("loss", "first_loss"):
        columns[name] = columns[name].astype(np.float64)
        if not np.isfinite(columns[name]).all():
            raise bad(f"column {name!r} holds losses that are not finite")
    return Split(**{name: values[order] for name, values in columns.items()})


def _features(path: Path) -> Features:
    try:
        arrays = map_arrays(path, ("index", "features", "kind"))
        index, features, kind = arrays["index"], arrays["features"], arrays["kind"]
    except (OSError, ValueError) as error:
        raise UserError(f"damaged: not the features of a run ({error})", where=path) from error
    if (
        index.ndim != 1
        or features.ndim != 2
        or len(index) != len(features)
        or len(index) == 0
        or not np.issubdtype(index.dtype, np.integer)
        or not np.issubdtype(features.dtype, np.floating)
        or len(np.unique(index)) != len(index)
        or index.min() < 0
        or kind.shape != ()
        or kind.dtype.kind != "U"
    ):
        raise UserError(
            f"damaged: index {index.dtype} {index.shape} and features {features.dtype} {features.shape}",
            where=path,
            expected="index int (n,), no index twice, and features float (n, d)",
        )
    if not np.isfinite(features).all():
        raise UserError("damaged: features that are not finite", where=path)
    return Features(index.astype(np.int64), features.astype(np.float32), str(kind))


# -- the data set


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data set of a run, as far as a report needs it."""

    folder: Path
    manifest: Manifest
    labels: np.ndarray
    """int64 (n,): training labels as given."""
    origins: Sequence[str]
    """Where the training images came from."""
    truth: SplitTruth | None
    """About the training images; None in a data set of unknown origin."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names


def find_data(run: Run) -> Data | str:
    """The data set that a run was trained on; where it cannot be had, the reason.

    It is looked for where the run found it, and in a folder `datasets` beside the run or above it, since storages move.

    Raises:
        UserError: it was found and is damaged.
    """
    places = []
    if run.config.get("data"):
        places.append(Path(str(run.config["data"])))
    name = Path(run.dataset).name
    if name:
        places += [parent / "datasets" / name for parent in list(run.folder.resolve().parents)[:3]]
    folder = next((place for place in places if (place / "manifest.json").is_file()), None)
    if folder is None:
        return "the data set's folder was not found"
    manifest = read_manifest(folder)
    if run.data_hash is not None and manifest.data_hash != run.data_hash:
        return "the data set's folder holds other data than the run was trained on"
    for file in (SAMPLES, TRUTH):
        # the images are vouched for by the training that read them; hashing them again could take minutes
        record, path = manifest.files.get(file), folder / file
        if record is not None and (not path.is_file() or sha256_file(path) != record.sha256):
            raise UserError("missing, damaged or of another data set", where=path, hint="prepare the data set again")
    count = manifest.counts["train"]
    most = sum(manifest.counts.values())
    samples = read_samples(folder, most).get("train")
    if samples is None or len(samples.label) != count:
        raise UserError(f"not {count} training samples, as the manifest says", where=folder / SAMPLES)
    truth = None
    if TRUTH in manifest.files:
        truth = read_truth(folder, most).get("train")
        if truth is None or len(truth.poisoned) != count:
            raise UserError(f"not {count} training samples, as the manifest says", where=folder / TRUTH)
        classes = (truth.true_label.min(), truth.true_label.max())
        if classes[0] < 0 or classes[1] >= manifest.num_classes:
            raise UserError(f"labels from {classes[0]} to {classes[1]}", where=folder / TRUTH)
    if samples.label.min() < 0 or samples.label.max() >= manifest.num_classes:
        raise UserError("labels of no class", where=folder / SAMPLES)
    for what, found in (
        ("split.parquet", None if run.split is None else len(run.split.loss) != count),
        ("features.npz", None if run.features is None else run.features.index.max() >= count),
    ):
        if found:
            raise UserError(f"is not about the {count} training images of {manifest.name}", where=run.folder / what)
    return Data(folder=folder, manifest=manifest, labels=samples.label, origins=samples.origin, truth=truth)


def read_images(data: Data, index: np.ndarray) -> np.ndarray:
    """Training images uint8 (n, H, W, 3).

    Raises:
        UserError: the data file is missing or damaged.
    """
    from data_prep.beton import BetonStream

    manifest = data.manifest
    with BetonStream(
        data.folder / "train.beton", expect_count=manifest.counts["train"], expect_px=manifest.image_px
    ) as stream:
        (batch,) = (images.copy() for images, _, _ in stream.batches(index, len(index)))
    return batch


def results_of(runs: Sequence[Run]) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Results of finished runs, and what sets each apart from others of its name, for `tables.aggregate`."""
    finished = [run for run in runs if run.result is not None]
    results: list[Mapping[str, Any]] = [run.result for run in finished if run.result is not None]
    keys = [(tables.family(r), r.get("attack"), r.get("preset"), r.get("train_size"), r["method"]) for r in results]
    return results, settings.differing(keys, [settings.of_method(run.config, _attack(run)) for run in finished])


def _attack(run: Run) -> Mapping[str, Any] | None:
    if not run.config.get("data"):
        return None
    try:
        manifest = read_manifest(str(run.config["data"]))
    except UserError:  # the table can be made without the data set
        return None
    return manifest.attack if manifest.data_hash == run.data_hash else None
