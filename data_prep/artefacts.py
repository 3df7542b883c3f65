"""What an attack that needs a trained model leaves for `dbd prepare`: arrays and their description, checked when read.

An artefact is a folder of two files: `artefact.npz` (arrays, never pickled) and `artefact.json` (what they are, the
data set that they were made for, and the settings and figures of their making).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.io.hashes import sha256_file, sha256_json
from data_prep.io.json import read_json

ARRAYS_FILE = "artefact.npz"
DESCRIPTION_FILE = "artefact.json"
FORMAT_VERSION = 1
FINGERPRINT_IMAGES = 64

ARRAYS: dict[str, dict[str, tuple[str, int]]] = {
    "label-consistent": {"index": ("int64", 1), "images": ("uint8", 4)},
    "adaptive": {"pattern": ("uint8", 3), "mask": ("uint8", 2)},
}
"""By kind, by array: dtype and number of dimensions. label-consistent: training positions (m,) and their perturbed
images (m, H, W, 3), without the trigger. adaptive: the pattern (H, W, 3) and its share at each pixel (H, W), in
1/255."""

_FIELDS = {"format_version", "kind", "image_px", "target", "fingerprint", "settings", "evidence", "versions", "sha256"}
_KINDS = {"image_px": int, "target": int, "fingerprint": str, "settings": dict, "evidence": dict, "sha256": str}
_AGAIN = "make it again with dbd craft"


def fingerprint(labels: np.ndarray, first_images: np.ndarray) -> str:
    """Hex sha256 that tells clean training sets apart without decoding all of them.

    Args:
        labels: int (n,), the true labels of all training images.
        first_images: uint8 (min(n, 64), H, W, 3), the first of them.
    """
    assert len(first_images) == min(len(labels), FINGERPRINT_IMAGES)
    digest = hashlib.sha256(f"{len(labels)} labels, {first_images.shape} pixels\n".encode())
    digest.update(labels.astype("<i8").tobytes())
    digest.update(np.ascontiguousarray(first_images).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artefact:
    """An artefact that was read and checked."""

    folder: Path
    kind: str
    image_px: int
    target: int
    """The label that the attack aims at."""
    fingerprint: str
    """Of the clean training set that it was made for."""
    settings: Mapping[str, Any]
    """How it was made."""
    evidence: Mapping[str, Any]
    """What it was measured to do when it was made."""
    sha256: str
    """Of the arrays' file."""
    arrays: Mapping[str, np.ndarray]
    """Large ones stay on disk until they are indexed."""


def write_artefact(
    folder: str | os.PathLike[str],
    kind: str,
    arrays: Mapping[str, np.ndarray],
    *,
    target: int,
    fingerprint: str,
    settings: Mapping[str, Any],
    evidence: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Artefact:
    """Write an artefact whole or not at all, replacing one that is there; see `Artefact` for the arguments.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    wanted = ARRAYS[kind]
    assert set(arrays) == set(wanted)
    assert all(str(arrays[n].dtype) == dtype and arrays[n].ndim == dims for n, (dtype, dims) in wanted.items())
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        np.savez(partial / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
        content = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "image_px": int(arrays["images" if kind == "label-consistent" else "pattern"].shape[-2]),
            "target": target,
            "fingerprint": fingerprint,
            "settings": dict(settings),
            "evidence": dict(evidence),
            "versions": dict(versions),
            "sha256": sha256_file(partial / ARRAYS_FILE),
        }
        content["checksum"] = sha256_json(content)
        (partial / DESCRIPTION_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        old = partial.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the artefact cannot be written ({error.strerror})", where=folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_artefact(folder, kind)


def read_artefact(folder: str | os.PathLike[str], kind: str | None) -> Artefact:
    """Read and check an artefact, of any kind where `kind` is None.

    Raises:
        UserError: not an artefact, one of another kind, damaged, or edited since it was written.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(
            f"not an artefact: {DESCRIPTION_FILE} cannot be read ({error.strerror})",
            where=folder,
            hint="make one with dbd craft",
        ) from error
    except ValueError as error:
        raise UserError(f"not JSON ({error})", where=path, hint=_AGAIN) from error
    if not isinstance(content, dict) or set(content) != _FIELDS | {"checksum"}:
        raise UserError("not the description of an artefact", where=path, hint=_AGAIN)
    checksum = content.pop("checksum")
    try:
        intact = checksum == sha256_json(content)
    except RecursionError:  # less deep than what JSON's reader gives up at
        intact = False
    if not intact:
        raise UserError("edited since it was written: the checksum differs", where=path, hint=_AGAIN)
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"format version {_short(content['format_version'])}", where=path, expected=str(FORMAT_VERSION))
    kinds = tuple(ARRAYS) if kind is None else (kind,)
    if content["kind"] not in kinds:
        raise UserError(f"an artefact for {_short(content['kind'])}", where=folder, expected=f"one for {kinds[0]}")
    kind = str(content["kind"])
    for name, kind_of in _KINDS.items():
        if not isinstance(content[name], kind_of) or isinstance(content[name], bool):
            raise UserError(f"field {name} is {_short(repr(content[name]))}", where=path, hint=_AGAIN)
    arrays_path = folder / ARRAYS_FILE
    try:
        damaged = sha256_file(arrays_path) != content["sha256"]
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=arrays_path, hint=_AGAIN) from error
    if damaged:
        raise UserError("damaged: its sha256 differs from the description's", where=arrays_path, hint=_AGAIN)
    try:
        arrays = map_arrays(arrays_path, ARRAYS[kind])
    except (ValueError, OSError) as error:
        raise UserError(f"not the arrays of an artefact ({error})", where=arrays_path, hint=_AGAIN) from error
    _check_arrays(kind, arrays, content["image_px"], arrays_path)
    described = {n: content[n] for n in ("image_px", "target", "fingerprint", "settings", "evidence", "sha256")}
    return Artefact(folder=folder, kind=kind, arrays=arrays, **described)


def _check_arrays(kind: str, arrays: Mapping[str, np.ndarray], px: int, where: Path) -> None:
    for name, (dtype, dims) in ARRAYS[kind].items():
        array = arrays[name]
        side_at = {"images": (1, 2), "pattern": (0, 1), "mask": (0, 1)}.get(name, ())
        fits = str(array.dtype) == dtype and array.ndim == dims and all(array.shape[axis] == px for axis in side_at)
        if not fits or (name in ("images", "pattern") and array.shape[-1] != 3):
            raise UserError(
                f"array {name!r} is {array.dtype} {array.shape}",
                where=where,
                expected=f"{dtype} of {dims} dimensions, {px} px",
                hint=_AGAIN,
            )
    if kind == "label-consistent":
        index = arrays["index"]
        if len(index) != len(arrays["images"]) or not len(index) or (np.diff(index) <= 0).any() or index[0] < 0:
            raise UserError("the positions of the perturbed images are not in order", where=where, hint=_AGAIN)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
