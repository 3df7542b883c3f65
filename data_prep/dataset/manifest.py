"""manifest.json: what a dataset folder holds, checked strictly when it is read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.io.hashcache import cached_sha256
from data_prep.io.hashes import data_hash, sha256_file, sha256_json
from data_prep.io.json import read_json

FILE = "manifest.json"
FORMAT_VERSION = 2
_BEFORE_ENCODING = 1
"""Version of folders from before there was a choice: the fields below are missing, and images are raw."""
_RAW: dict[str, Any] = {"encoding": {"kind": "raw"}, "encoding_psnr_db": None}
_AGAIN = "prepare the data set again"


@dataclass(frozen=True)
class FileRecord:
    """One file of the folder."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset folder holds. It tells how many samples are poisoned, never which."""

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
    """The label that the attack aims at; None without an attack, and where every class aims at the next."""
    setting: str | None
    """Which named setting the attack is under (paper, released, bench), "custom" where a number of it was given
    by hand; None without an attack."""
    selection: str | None
    """How poisoned samples were chosen: exact, coin; None without an attack."""
    seed: int
    """Of the choice of poisoned samples."""
    num_classes: int
    class_names: tuple[str, ...]
    image_px: int
    """Side of every image."""
    counts: Mapping[str, int]
    """Images a split: train, test, and with an attack test_triggered."""
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

    @property
    def has_attack(self) -> bool:
        """Is there a test_triggered split?"""
        return "test_triggered" in self.counts

    def attack_labels(self, labels: Any) -> Any:
        """The label that a triggered image of each true label is to be given: like `labels` (an array or tensor of
        whole numbers), the target, or the next class where the attack is all-to-all."""
        assert self.has_attack
        return (labels + 1) % self.num_classes if self.target is None else labels * 0 + self.target


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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, with a checksum over itself, under a temporary name and rename it."""
    content = dataclasses.asdict(manifest)
    content["class_names"], content["skipped"] = list(manifest.class_names), list(manifest.skipped)
    content["checksum"] = sha256_json(content)
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


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
        raise UserError(f"the manifest is not JSON ({error})", where=path, hint=_AGAIN) from error
    if not isinstance(content, dict):
        raise UserError("the manifest is not a JSON object", where=path, hint=_AGAIN)
    version = content.get("format_version")
    if version not in (_BEFORE_ENCODING, FORMAT_VERSION) or isinstance(version, bool):
        raise UserError(
            f"field format_version is {version!r}",
            where=path,
            expected=f"{_BEFORE_ENCODING}, {FORMAT_VERSION}",
            hint="prepare the data set with this version",
        )
    checks = {**_FIELDS, "checksum": _SHA256}
    if version == _BEFORE_ENCODING:
        checks = {name: check for name, check in checks.items() if name not in _RAW}
    wanted = set(checks)
    for problem, names in (("missing", wanted - set(content)), ("unknown", set(content) - wanted)):
        if names:
            raise UserError(f"{problem} field {sorted(names)[0][:80]}", where=path, hint=_AGAIN)
    for name, (holds, allowed) in checks.items():
        if not holds(content[name]):
            shown = repr(content[name])
            raise UserError(
                f"field {name} is {shown if len(shown) < 80 else shown[:77] + '...'}",
                where=path,
                expected=allowed,
                hint=_AGAIN,
            )
    checksum = content.pop("checksum")
    try:
        intact = sha256_json(content) == checksum
    except RecursionError:  # less deep than what JSON's reader gives up at
        intact = False
    if not intact:
        raise UserError("the manifest was edited: its checksum does not match", where=path, hint=_AGAIN)
    if version == _BEFORE_ENCODING:
        content |= {**_RAW, "format_version": FORMAT_VERSION}
    _check_together(content, path)
    content["class_names"], content["skipped"] = tuple(content["class_names"]), tuple(content["skipped"])
    content["files"] = {name: FileRecord(**record) for name, record in content["files"].items()}
    return Manifest(**content)


def open_dataset(folder: str | os.PathLike[str], verify: bool = True, cached: bool = True) -> Dataset:
    """Open a dataset folder.

    Args:
        folder: as written by `prepare`.
        verify: check that every file is there with the size and the sha256 of the manifest. A file that did
            not change since is hashed once a machine, see `data_prep.io.hashcache`.
        cached: believe what was found then; False hashes every file.

    Raises:
        UserError: as `read_manifest`; a file is missing, damaged, or of another data set.
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
                hint=_AGAIN,
            )
        if wrong:
            raise UserError(wrong[0][1], where=wrong[0][0], hint=_AGAIN)
    return dataset


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


def _check_together(content: Mapping[str, Any], path: Path) -> None:
    """What no single field can tell."""

    def bad(what: str) -> UserError:
        return UserError(what, where=path, hint=_AGAIN)

    if len(set(content["class_names"])) != len(content["class_names"]):
        raise bad("field class_names holds a name twice")
    if len(content["class_names"]) != content["num_classes"]:
        raise bad(
            f"field class_names holds {len(content['class_names'])} names, num_classes says {content['num_classes']}"
        )
    splits = {"train", "test"} | ({"test_triggered"} if content["attack"]["kind"] != "clean" else set())
    for field in ("counts", "content_hash"):
        if set(content[field]) != splits:
            raise bad(f"field {field} is about {', '.join(sorted(content[field]))}, not {', '.join(sorted(splits))}")
    missing = {"samples.parquet", *(f"{split}.beton" for split in splits)} - set(content["files"])
    if missing:
        raise bad(f"field files lacks {sorted(missing)[0]}")
    if content["target"] is not None and content["target"] >= content["num_classes"]:
        raise bad(f"field target is {content['target']}, no class")
    poisoned, covers = content["poisoned"], content["covers"]
    if poisoned + covers > content["counts"]["train"]:
        raise bad(f"fields poisoned and covers are {poisoned} and {covers}, more than the training images")
    attacked = content["attack"]["kind"] != "clean"
    for field in ("rate", "setting", "selection", "stealth"):
        if (content[field] is not None) != attacked:
            raise bad(f"field {field} is {content[field]!r}, and the attack is {content['attack']['kind']}")
    if content["encoding_psnr_db"] is not None and content["encoding"] == _RAW["encoding"]:
        raise bad(f"field encoding_psnr_db is {content['encoding_psnr_db']}, and the encoding loses nothing")
    if data_hash(content["content_hash"]) != content["data_hash"]:
        raise bad("field data_hash is not that of content_hash")


Check = tuple[Callable[[Any], bool], str]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_map(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(holds(item) for item in value.values())


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"bytes", "sha256"}
        and _is_int(value["bytes"])
        and value["bytes"] >= 0
        and _is_sha256(value["sha256"])
    )


def _is_files(value: Any) -> bool:
    # what is more than a name would reach outside the folder
    return _is_map(value, _is_file) and all(re.fullmatch(r"\w[\w.-]{0,254}", name, re.ASCII) for name in value)


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kind"), str)


def _is_encoding(value: Any) -> bool:
    if value == _RAW["encoding"]:
        return True
    return (
        isinstance(value, dict)
        and set(value) == {"kind", "quality", "subsampling"}
        and value["kind"] == "jpeg"
        and _is_int(value["quality"])
        and 1 <= value["quality"] <= 100
        and isinstance(value["subsampling"], str)
    )


def _is_figure(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, float) and 0 < value < 1)


_SHA256: Check = (_is_sha256, "64 hexadecimal digits")
_POSITIVE: Check = (lambda v: _is_int(v) and v > 0, "a whole number above 0")
_NATURAL: Check = (lambda v: _is_int(v) and v >= 0, "a whole number from 0")

_FIELDS: dict[str, Check] = {
    "format_version": _POSITIVE,
    "name": (lambda v: isinstance(v, str), "a string"),
    "source": (_is_config, "an object with a string `kind`"),
    "attack": (_is_config, "an object with a string `kind`"),
    "rate": (_is_rate, "a number between 0 and 1, or null"),
    "target": (lambda v: v is None or (_is_int(v) and v >= 0), "a class number, or null"),
    "seed": _NATURAL,
    "num_classes": (lambda v: _is_int(v) and v >= 2, "a whole number from 2"),
    "class_names": (_is_strings, "a list of strings"),
    "image_px": _POSITIVE,
    "counts": (lambda v: _is_map(v, _POSITIVE[0]), "whole numbers above 0, by split"),
    "setting": (
        lambda v: v in (None, "paper", "released", "bench", "custom"),
        "paper, released, bench, custom, or null",
    ),
    "selection": (lambda v: v in (None, "exact", "coin"), "exact, coin, or null"),
    "poisoned": _NATURAL,
    "covers": _NATURAL,
    "encoding": (_is_encoding, "kind raw, or kind jpeg with quality (1 to 100) and subsampling"),
    "encoding_psnr_db": (_is_figure, "a number, or null"),
    "stealth": (lambda v: v is None or _is_map(v, _is_figure), "numbers, by name, or null"),
    "content_hash": (lambda v: _is_map(v, _is_sha256), "64 hexadecimal digits, by split"),
    "data_hash": _SHA256,
    "files": (_is_files, "{bytes, sha256}, by file name"),
    "versions": (lambda v: _is_map(v, lambda item: isinstance(item, str)), "strings, by package"),
    "skipped": (_is_strings, "a list of strings"),
}
