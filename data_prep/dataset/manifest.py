"""manifest.json: what a dataset folder holds, checked strictly when it is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.beton.format import check_beton, expect
from data_prep.dataset.checks import AGAIN, FIELDS, RAW, SHA256, check_together
from data_prep.errors import UserError
from data_prep.io.hashcache import cached_sha256
from data_prep.io.hashes import sha256_file
from data_prep.io.json import SEAL, read_json, sealed, unsealed, write_json

FILE = "manifest.json"
FORMAT_VERSION = 4
_SINCE = {
    "encoding": 2,
    "encoding_psnr_db": 2,
    "protocol": 3,
    "label_map": 3,
    "holdout_clean": 4,
    "conversions": 4,
    "notes": 4,
}
"""Fields that came with a later version than 1; before 3, protocol was called setting."""


_TUPLES = ("class_names", "label_map", "skipped", "notes")


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset folder holds: how many samples are poisoned, never which."""

    format_version: int = FORMAT_VERSION
    name: str
    """What the data set is, e.g. digits-badnets-r0.05-t3-s0."""
    source: Mapping[str, Any]
    """The source's config; `kind` is its name."""
    attack: Mapping[str, Any]
    """The attack's config; `kind` is its name, "clean" where there is none."""
    rate: float | None
    """Poisoned share of the training images; None without an attack."""
    target: int | None
    """The label that the attack aims at; None without an attack, and where there is more than one."""
    label_map: tuple[int, ...]
    """The label that a triggered image of each class is to be given; empty without an attack."""
    protocol: str | None
    """Which protocol the attack follows (paper, released, ten-percent; bench in folders of before), "custom" where a
    number of it was given by hand; None without an attack."""
    selection: str | None
    """How poisoned samples were chosen: exact, coin; None without an attack."""
    seed: int
    """Of the choice of poisoned samples."""
    num_classes: int
    class_names: tuple[str, ...]
    image_px: int
    """Side of every image."""
    counts: Mapping[str, int]
    """Images a split: train, test, with an attack test_triggered, with clean images set aside holdout."""
    holdout_clean: float | None
    """Share of every class's training images that was set aside before poisoning; None where none was. They are no
    part of `train`."""
    poisoned: int
    """Poisoned training images."""
    covers: int
    """Training images that carry a trigger and kept their label."""
    encoding: Mapping[str, Any]
    """How the files hold their images: `kind` raw, or jpeg with its `quality` and `subsampling`."""
    encoding_psnr_db: float | None
    """What that costs: PSNR of the training images as they are decoded against what they were before, of the mean
    squared error over all of them; None where nothing changed."""
    stealth: Mapping[str, Any] | None
    """How visible the poison is, before it is encoded, see `data_prep.stealth.summarise`; None without an attack."""
    content_hash: Mapping[str, str]
    """A split's hash over decoded samples in index order: equal data sets have equal hashes, however they
    were written."""
    data_hash: str
    """One hash over those of the splits: identifies the data."""
    files: Mapping[str, FileRecord]
    """Size and sha256 of every other file in the folder."""
    versions: Mapping[str, str]
    """Of the software that wrote the folder."""
    skipped: tuple[str, ...]
    """Images that could not be read and were left out, each with the reason."""
    conversions: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Training and test images that were converted, by what was done to them (grayscale, palette, ...)."""
    notes: tuple[str, ...] = ()
    """What was decided where the source left a choice: test images, classes, columns."""

    @property
    def has_attack(self) -> bool:
        """Is there a test_triggered split?"""
        return "test_triggered" in self.counts

    def attack_labels(self, labels: Any) -> Any:
        """The label that a triggered image of each true label is to be given: like `labels`, an integer array or
        tensor."""
        assert self.has_attack
        label_map = np.array(self.label_map) if isinstance(labels, np.ndarray) else labels.new_tensor(self.label_map)
        return label_map[labels]


@dataclass(frozen=True)
class Dataset:
    """A dataset folder whose manifest was read."""

    folder: Path
    manifest: Manifest

    @property
    def train(self) -> Path:
        """Training images with the labels that the victim is given."""
        return self.folder / "train.beton"

    @property
    def test(self) -> Path:
        """Clean test images with true labels."""
        return self.folder / "test.beton"

    @property
    def test_triggered(self) -> Path | None:
        """All test images with the trigger and true labels; None without an attack."""
        return self.folder / "test_triggered.beton" if self.manifest.has_attack else None

    @property
    def holdout(self) -> Path | None:
        """Clean training images that were set aside before poisoning, with true labels; None where none were."""
        return self.folder / "holdout.beton" if "holdout" in self.manifest.counts else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, with a checksum over itself, whole or not at all."""
    content = dataclasses.asdict(manifest)
    content |= {name: list(content[name]) for name in _TUPLES}
    write_json(folder / FILE, sealed(content))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check a manifest.

    Raises:
        UserError: no manifest; not JSON; unknown, missing or mistyped fields, fields that contradict each
            other; edited since it was written.
    """
    folder = Path(folder)
    path = folder / FILE
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            "not a dataset folder: there is no manifest.json", where=folder, hint="make one with dbd prepare"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read the manifest ({error.strerror})", where=path) from error
    except ValueError as error:
        raise UserError(f"the manifest is not JSON ({error})", where=path, hint=AGAIN) from error
    if not isinstance(content, dict):
        raise UserError("the manifest is not a JSON object", where=path, hint=AGAIN)
    version = content.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise UserError(
            f"field format_version is {version!r}",
            where=path,
            expected=f"1 to {FORMAT_VERSION}",
            hint="prepare the data set with this version",
        )
    checks = {name: check for name, check in FIELDS.items() if _SINCE.get(name, 1) <= version}
    checks |= {SEAL: SHA256} | ({"setting": FIELDS["protocol"]} if version < 3 else {})
    wanted = set(checks)
    for problem, names in (("missing", wanted - set(content)), ("unknown", set(content) - wanted)):
        if names:
            raise UserError(f"{problem} field {sorted(names)[0][:80]}", where=path, hint=AGAIN)
    for name, (holds, allowed) in checks.items():
        if not holds(content[name]):
            shown = repr(content[name])
            raise UserError(
                f"field {name} is {shown if len(shown) < 80 else shown[:77] + '...'}",
                where=path,
                expected=allowed,
                hint=AGAIN,
            )
    try:
        content = unsealed(content)
    except ValueError as error:
        raise UserError(f"the manifest was {error}", where=path, hint=AGAIN) from error
    content = _upgraded(content, version)
    check_together(content, path)
    content |= {name: tuple(content[name]) for name in _TUPLES}
    content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(**content)


def _upgraded(content: dict[str, Any], version: int) -> dict[str, Any]:
    """The fields of this version."""
    content["format_version"] = FORMAT_VERSION
    if version < 2:  # there was no choice
        content |= {"encoding": RAW, "encoding_psnr_db": None}
    if version < 4:
        content |= {"conversions": {}, "notes": []}
    if version < 3:
        target, classes = content["target"], range(len(content["class_names"]))
        content["protocol"] = content.pop("setting")
        content["label_map"] = [(c + 1) % len(classes) if target is None else target for c in classes]
        if content["attack"]["kind"] == "clean":
            content["label_map"] = []
    if version < 4:
        content["holdout_clean"] = None
    return content


def open_dataset(folder: str | os.PathLike[str], verify: bool = True, cached: bool = True) -> Dataset:
    """Open a dataset folder.

    Args:
        folder: as written by `prepare`.
        verify: check that every file is there with the size and the sha256 of the manifest, and that labels are
            classes. A file that did not change since is hashed once a machine, see `data_prep.io.hashcache`.
        cached: believe what was found then; False hashes every file.

    Raises:
        UserError: as `read_manifest`; a file is missing, damaged, or of another data set; a label is no class.
    """
    folder = Path(folder)
    dataset = Dataset(folder, read_manifest(folder))
    if verify:
        wrong = [
            problem
            for name, record in dataset.manifest.files.items()
            if (problem := _mismatch(folder / name, record, cached_sha256 if cached else sha256_file))
        ]
        if len(wrong) == len(dataset.manifest.files):
            raise UserError(
                "no file matches the manifest: it belongs to another data set",
                where=folder / FILE,
                hint=AGAIN,
            )
        if wrong:
            raise UserError(wrong[0][1], where=wrong[0][0], hint=AGAIN)
        manifest = dataset.manifest
        for split, count in manifest.counts.items():  # whoever edits a file can write its hashes too
            expect(check_beton(folder / f"{split}.beton"), count, manifest.image_px, manifest.num_classes)
    return dataset


def check_recorded(folder: Path, data_hash: Any, run: Path) -> None:
    """Refuse another data set than the one that a run was made on: folders move, and others take their names.

    Args:
        folder: that the run recorded.
        data_hash: that it recorded, too; None in those that did not.
        run: the file that says so, for the message.

    Raises:
        UserError: no data set is there, or another one.
    """
    hint = "name the run's own data set with --data"
    try:
        found = read_manifest(folder).data_hash
    except UserError as error:
        raise UserError(error.what, where=error.where, hint=hint) from error
    if data_hash not in (None, found):
        raise UserError(
            f"holds other data ({found[:12]}) than the run was made on ({str(data_hash)[:12]}, see {run})",
            where=folder,
            hint=hint,
        )


def _mismatch(path: Path, record: FileRecord, sha256_of: Callable[[Path], str]) -> tuple[Path, str] | None:
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return (
                path,
                f"the file has {size} bytes, the manifest says {record.bytes}: truncated or of another data set",
            )
        found = sha256_of(path)
    except FileNotFoundError:
        return path, "the file is missing"
    except OSError as error:
        return path, f"cannot read the file ({error.strerror})"
    if found != record.sha256:
        return path, "the file's sha256 is not that of the manifest: damaged, edited or of another data set"
    return None


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file in a folder, by name."""
    return {
        path.name: FileRecord(path.stat().st_size, sha256_file(path))
        for path in sorted(folder.iterdir())
        if path.name != FILE
    }
