"""Every sample of a data set, checked against everything that the folder says about it: `dbd doctor DATASET`.

It reads the truth, to hold it against the labels given, so nothing but that command may import it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.artefacts import DESCRIPTION_FILE, read_artefact
from data_prep.beton import BetonStream, check_beton
from data_prep.dataset.manifest import FILE as MANIFEST
from data_prep.dataset.manifest import Dataset, open_dataset, read_manifest
from data_prep.dataset.samples import FILE as SAMPLES
from data_prep.dataset.samples import Samples, read_samples
from data_prep.dataset.truth import FILE as TRUTH
from data_prep.dataset.truth import SplitTruth, read_truth
from data_prep.errors import UserError, printable
from data_prep.images import decode_image
from data_prep.io.hashes import ContentHash, data_hash
from data_prep.progress import Progress

_BATCH_BYTES = 8 << 20
_AGAIN = "prepare the data set again, or copy it again"


@dataclass(frozen=True)
class Passed:
    """One check that found nothing wrong."""

    name: str
    detail: str


def is_dataset(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def is_artefact(folder: Path) -> bool:
    return (folder / DESCRIPTION_FILE).is_file()


def verify_dataset(folder: Path, *, progress: bool = True) -> Iterator[Passed]:
    """Check a dataset folder, one thing after the other, believing no earlier check.

    Files are hashed anew, every image is decoded and every content hash recomputed. Memory is bounded by a batch of
    images and by the tables of labels and origins.

    Args:
        folder: as `prepare` writes it.
        progress: show it on stderr.

    Yields:
        A check that passed.

    Raises:
        UserError: the first that did not; names the file, and the sample where it is one.
    """
    manifest = read_manifest(folder)
    counts = manifest.counts
    yield Passed("manifest", f"{printable(manifest.name)}, {manifest.num_classes} classes, {manifest.image_px} px")

    dataset = open_dataset(folder, cached=False)
    size = sum(record.bytes for record in manifest.files.values())
    more = sorted(p.name for p in folder.iterdir() if p.name not in manifest.files and p.name != MANIFEST)
    extra = f"; not in the manifest: {printable(', '.join(more[:5]))}" if more else ""
    yield Passed("files", f"{len(manifest.files)} files, {size / 2**20:,.1f} MiB, sha256 as in the manifest{extra}")

    labels: dict[str, np.ndarray] = {}
    for split, path in _betons(dataset):
        info = check_beton(path)
        _check_count(path, info.count, counts[split])
        if (info.height_px, info.width_px) != (manifest.image_px, manifest.image_px):
            raise _bad(path, f"images of {info.width_px} x {info.height_px} px, the manifest says {manifest.image_px}")
        if info.jpeg != (manifest.encoding["kind"] == "jpeg"):
            held = "JPEG" if info.jpeg else "raw pixels"
            raise _bad(path, f"images are {held}, the manifest's encoding is {manifest.encoding['kind']}")
        labels[split] = info.labels
    yield Passed("tables", ", ".join(f"{split} {counts[split]:,} samples, index complete" for split in labels))

    for split, path in _betons(dataset):
        _check_classes(path, labels[split], manifest.num_classes)
    yield Passed("labels", f"0 to {manifest.num_classes - 1}")

    found = {split: _content_hash(path, split, dataset, progress) for split, path in _betons(dataset)}
    if data_hash(found) != manifest.data_hash:
        raise _bad(folder / MANIFEST, "data_hash is not that of the content hashes")
    yield Passed("images", f"{sum(counts.values()):,} decoded; content and data hash as in the manifest")

    _check_samples(dataset, labels)
    yield Passed("samples", f"{SAMPLES}: labels and index as in the data files")

    yield Passed("truth", _check_truth(dataset, labels))

    if "preview.png" in manifest.files:
        path = folder / "preview.png"
        shape = decode_image(path, where=str(path)).shape
        yield Passed("preview", f"{shape[1]} x {shape[0]} px")


def verify_artefact(folder: Path) -> Iterator[Passed]:
    """Check what `dbd craft` wrote; as `verify_dataset`."""
    artefact = read_artefact(folder, kind=None)
    yield Passed("artefact", f"{printable(artefact.kind)}, target {artefact.target}, {artefact.image_px} px")
    shapes = ", ".join(f"{name} {array.shape}" for name, array in artefact.arrays.items())
    yield Passed("arrays", f"{printable(shapes)}, sha256 as in the description")


def _betons(dataset: Dataset) -> Iterator[tuple[str, Path]]:
    for split in dataset.manifest.counts:
        yield split, dataset.folder / f"{split}.beton"


def _bad(path: Path, what: str, sample: int | None = None) -> UserError:
    return UserError(what, where=path if sample is None else f"{path}, sample {sample}", hint=_AGAIN)


def _check_count(path: Path, found: int, promised: int) -> None:
    if found != promised:
        raise _bad(path, f"{found} samples, the manifest says {promised}")


def _check_classes(path: Path, labels: np.ndarray, num_classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise _bad(path, f"label {labels[first]} is not a class, 0 to {num_classes - 1}", first)


def _content_hash(path: Path, split: str, dataset: Dataset, progress: bool) -> str:
    px, digest = dataset.manifest.image_px, ContentHash(dataset.manifest.image_px)
    with (
        BetonStream(path, expect_count=dataset.manifest.counts[split], expect_px=px) as stream,
        Progress(f"check {split}", len(stream), show=progress) as bar,
    ):
        batch = max(1, min(len(stream), _BATCH_BYTES // (px * px * 3)))
        for images, labels, _ in stream.batches(np.arange(len(stream)), batch):
            digest.update(images, labels)
            bar.add(len(images))
    if digest.hexdigest() != dataset.manifest.content_hash[split]:
        raise _bad(path, "the decoded images and labels are not those of the manifest's content hash")
    return digest.hexdigest()


def _check_samples(dataset: Dataset, labels: Mapping[str, np.ndarray]) -> None:
    path, counts = dataset.folder / SAMPLES, dataset.manifest.counts
    samples: Samples = read_samples(dataset.folder, most=sum(counts.values()))
    expected = [split for split in counts if split != "test_triggered"]
    if set(samples) != set(expected):
        raise _bad(path, f"about {', '.join(samples) or 'nothing'}, not {', '.join(expected)}")
    for split, rows in samples.items():
        _check_count(path, len(rows.label), counts[split])
        _check_equal(path, rows.label, labels[split], f"{split} label", f"in {split}.beton")
    if "test_triggered" in labels:
        triggered = dataset.folder / "test_triggered.beton"
        _check_count(triggered, len(labels["test_triggered"]), counts["test"])
        _check_equal(triggered, labels["test_triggered"], labels["test"], "label", "in test.beton")


def _check_equal(path: Path, ours: np.ndarray, theirs: np.ndarray, what: str, there: str) -> None:
    differing = np.flatnonzero(ours != theirs)
    if len(differing):
        first = int(differing[0])
        raise _bad(path, f"{what} {ours[first]}, {theirs[first]} {there}", first)


def _check_truth(dataset: Dataset, labels: Mapping[str, np.ndarray]) -> str:
    manifest, path = dataset.manifest, dataset.folder / TRUTH
    if TRUTH not in manifest.files:
        if manifest.has_attack or manifest.poisoned or manifest.covers:
            raise _bad(dataset.folder / MANIFEST, f"there is an attack, and no {TRUTH}")
        return "none: the images are untrusted"
    truth = read_truth(dataset.folder, most=sum(manifest.counts.values()))
    if set(truth) != set(manifest.counts):
        raise _bad(path, f"about {', '.join(truth) or 'nothing'}, not {', '.join(manifest.counts)}")
    for split, rows in truth.items():
        _check_count(path, len(rows.true_label), manifest.counts[split])
        _check_classes(path, rows.true_label, manifest.num_classes)
        if (rows.poisoned & rows.cover).any():
            raise _bad(path, f"{split}: both poisoned and cover", int(np.flatnonzero(rows.poisoned & rows.cover)[0]))
    train = truth["train"]
    for name, flags in (("poisoned", train.poisoned), ("covers", train.cover)):
        if int(flags.sum()) != getattr(manifest, name):
            raise _bad(path, f"{int(flags.sum())} {name}, the manifest says {getattr(manifest, name)}")
    _check_given(dataset, train, labels["train"])
    for split in labels.keys() - {"train"}:
        _check_equal(path, truth[split].true_label, labels[split], f"{split} true label", f"in {split}.beton")
        wrong = np.flatnonzero((truth[split].poisoned != (split == "test_triggered")) | truth[split].cover)
        if len(wrong):
            raise _bad(path, f"{split}: wrong about the trigger", int(wrong[0]))
    return f"{manifest.poisoned:,} poisoned, {manifest.covers:,} covers, labels given as the attack says"


def _check_given(dataset: Dataset, train: SplitTruth, given: np.ndarray) -> None:
    expected = train.true_label.copy()
    if dataset.manifest.has_attack:
        expected[train.poisoned] = dataset.manifest.attack_labels(train.true_label[train.poisoned])
    _check_equal(dataset.train, given, expected, "label", "by truth and attack")
