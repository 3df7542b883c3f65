"""The data set that a run was trained on: labels, origins, truth, and images to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.dataset.manifest import Manifest, read_manifest
from data_prep.dataset.samples import FILE as SAMPLES
from data_prep.dataset.samples import read_samples
from data_prep.dataset.truth import FILE as TRUTH
from data_prep.dataset.truth import SplitTruth, read_truth
from data_prep.errors import UserError
from data_prep.io.hashes import sha256_file
from dbd_dist.reporting.runs import Run


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
    places = [place for place in places if (place / "manifest.json").is_file()]
    if not places:
        return "the data set's folder was not found"
    for folder in places:
        manifest = read_manifest(folder)
        if run.data_hash in (None, manifest.data_hash):
            break
    else:
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
        ("ranking.parquet", None if run.ranking is None else len(run.ranking.loss) != count),
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
