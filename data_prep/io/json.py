"""JSON files: written atomically, read with limits, and sealed where an edit must not go unseen."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from data_prep.io import atomic, limits
from data_prep.io.hashes import sha256_json

SEAL = "checksum"
"""The field of a sealed object that holds the sha256 of all others."""


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1, sync: bool = False) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OSError: as `data_prep.io.atomic.replacing`.
    """
    atomic.write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n", sync=sync)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a checksum over itself."""
    return {**content, SEAL: sha256_json(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its checksum, which was compared.

    Raises:
        ValueError: none, or not that of the content.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    try:
        intact = content.get(SEAL) == sha256_json(rest)
    except RecursionError:  # less deep than what JSON's reader gives up at
        intact = False
    if not intact:
        raise ValueError("edited since it was written: its checksum does not match")
    return rest


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        ValueError: larger than `limits.JSON_BYTES`, not UTF-8, not JSON (NaN and infinity are not), nested too deeply.
    """
    try:
        content = limits.read_limited(path, limits.JSON_BYTES)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ValueError(error.strerror) from error
        raise
    return parse_json(content)


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON (NaN and infinity are not), nested too deeply.
    """
    text = content if isinstance(content, str) else content.decode("utf-8")
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):  # Python reads 1e999 as infinity
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
