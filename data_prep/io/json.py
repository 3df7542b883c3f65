"""JSON files that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from data_prep.io.hashes import refuse_pipes

MAX_BYTES = 256 << 20
"""Larger files are refused before they are read."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
        ValueError: larger than `MAX_BYTES`, not UTF-8, not JSON (NaN and infinity are not), nested too deeply.
    """
    refuse_pipes(path)
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
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
