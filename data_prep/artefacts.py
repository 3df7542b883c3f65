"""What an attack that needs a trained model leaves for `dbd prepare`: arrays and their description, checked when read.

An artefact is a folder of two files: `artefact.npz` (arrays, never pickled) and `artefact.json` (what they are, the
data set that they were made for, and the settings and figures of their making).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.io.arrays import map_arrays
from data_prep.io.atomic import replacing_folder
from data_prep.io.hashes import sha256_file
from data_prep.io.json import SEAL, read_json, sealed, unsealed, write_json

ARRAYS_FILE = "artefact.npz"
DESCRIPTION_FILE = "artefact.json"
FORMAT_VERSION = 1
FINGERPRINT_IMAGES = 64

Layout = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""The arrays of an artefact by name: dtype and shape. "px" is the side of the images; another letter is any length
above 0, the same wherever it stands. An array called index lists training samples in rising order."""
PERTURBED_IMAGES: Layout = {"index": ("int64", ("n",)), "images": ("uint8", ("n", "px", "px", 3))}
"""Training samples and their perturbed images, without a visible trigger."""
PATTERN_AND_MASK: Layout = {"pattern": ("uint8", ("px", "px", 3)), "mask": ("uint8", ("px", "px"))}
"""A pattern and its share at each pixel, in 1/255."""

_TYPES = {
    "kind": str, "image_px": int, "target": int, "fingerprint": str, "settings": dict, "evidence": dict, "sha256": str,
}  # fmt: skip
"""Of the fields that are read; there are versions too."""
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
    """Name of the attack."""
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
    image_px: int,
    target: int,
    fingerprint: str,
    settings: Mapping[str, Any],
    evidence: Mapping[str, Any],
    versions: Mapping[str, str],
    layout: Layout | None = None,
) -> Artefact:
    """Write an artefact whole or not at all, replacing one that is there; see `Artefact` for the arguments.

    Args:
        layout: of the arrays, as `read_artefact` takes it.

    Raises:
        UserError: the arrays do not have that layout, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        _check_arrays(arrays, layout, image_px)
        with replacing_folder(folder, overwrite=True) as partial:
            np.savez(partial / ARRAYS_FILE, **arrays)  # type: ignore[arg-type]
            content = {
                "format_version": FORMAT_VERSION,
                "kind": kind,
                "image_px": image_px,
                "target": target,
                "fingerprint": fingerprint,
                "settings": dict(settings),
                "evidence": dict(evidence),
                "versions": dict(versions),
                "sha256": sha256_file(partial / ARRAYS_FILE),
            }
            write_json(partial / DESCRIPTION_FILE, sealed(content))
    except ValueError as error:
        raise UserError(f"{error}", where=f"the arrays of {kind}") from error
    except OSError as error:
        raise UserError(f"the artefact cannot be written ({error.strerror})", where=folder) from error
    return read_artefact(folder, kind, layout)


def read_artefact(folder: str | os.PathLike[str], kind: str | None, layout: Layout | None = None) -> Artefact:
    """Read and check an artefact.

    Args:
        kind: of attack; None takes any, also one that is not installed here.
        layout: what the attack needs; None takes the layout above whose arrays are all there, or else any arrays.

    Raises:
        UserError: not an artefact, one of another kind, damaged, or edited since it was written.
    """
    folder = Path(folder)
    path, arrays_path = folder / DESCRIPTION_FILE, folder / ARRAYS_FILE
    try:
        content = _description(path)
    except OSError as error:
        what = f"not an artefact: {DESCRIPTION_FILE} cannot be read ({error.strerror})"
        hint = f"make one with `dbd craft {kind or 'ATTACK'} --data FOLDER --out {folder}`, FOLDER a clean data set"
        raise UserError(what, where=folder, hint=hint) from error
    except ValueError as error:
        raise UserError(f"not the description of an artefact ({error})", where=path, hint=_AGAIN) from error
    if kind not in (None, content["kind"]):
        raise UserError(f"an artefact for {_short(content['kind'])}", where=folder, expected=f"one for {kind}")
    try:
        if sha256_file(arrays_path) != content["sha256"]:
            raise UserError("damaged: its sha256 differs from the description's", where=arrays_path, hint=_AGAIN)
        arrays = map_arrays(arrays_path, layout)
        _check_arrays(arrays, layout, content["image_px"])
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=arrays_path, hint=_AGAIN) from error
    except ValueError as error:
        raise UserError(f"not the arrays of an artefact ({error})", where=arrays_path, hint=_AGAIN) from error
    return Artefact(folder=folder, arrays=arrays, **{name: content[name] for name in _TYPES})


def _description(path: Path) -> dict[str, Any]:
    """Raises:
    OSError: it cannot be read.
    ValueError: not a description of this version, or edited.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.keys() != {*_TYPES, "format_version", "versions", SEAL}:
        raise ValueError("it has other fields")
    content = unsealed(content)
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {_short(content['format_version'])}, expected {FORMAT_VERSION}")
    for name, wanted in _TYPES.items():
        if not isinstance(content[name], wanted) or isinstance(content[name], bool):
            raise ValueError(f"field {name} is {_short(repr(content[name]))}")
    return content


def _check_arrays(arrays: Mapping[str, np.ndarray], layout: Layout | None, px: int) -> None:
    """Raises:
    ValueError: an array is missing, or not as the layout says.
    """
    if layout is None:
        layout = next((known for known in (PERTURBED_IMAGES, PATTERN_AND_MASK) if known.keys() <= arrays.keys()), {})
    if not layout.keys() <= arrays.keys():
        raise ValueError(f"there is no array {min(layout.keys() - arrays.keys())!r}")
    sides: dict[int | str, int] = {"px": px}
    for name, (dtype, shape) in layout.items():
        array = arrays[name]
        wanted = [
            side if isinstance(side, int) else sides.setdefault(side, length)
            for side, length in zip(shape, array.shape)
        ]
        if str(array.dtype) != dtype or array.shape != (*wanted, *shape[len(wanted) :]) or 0 in array.shape:
            text = f"{dtype} ({', '.join(map(str, shape))}), px {px}"
            raise ValueError(f"array {name!r} is {array.dtype} {array.shape}, expected {text}")
    if "index" in layout and ((np.diff(arrays["index"]) <= 0).any() or arrays["index"][0] < 0):
        raise ValueError("the samples of the perturbed images are not in rising order")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
