"""What each field of a manifest has to be, and what only several of them can say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.io.hashes import data_hash

AGAIN = "prepare the data set again"
RAW: dict[str, Any] = {"kind": "raw"}
"""The encoding that loses nothing."""

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
    if value == RAW:
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


SHA256: Check = (_is_sha256, "64 hexadecimal digits")
_POSITIVE: Check = (lambda v: _is_int(v) and v > 0, "a whole number above 0")
_NATURAL: Check = (lambda v: _is_int(v) and v >= 0, "a whole number from 0")

FIELDS: dict[str, Check] = {
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
    "holdout_clean": (_is_rate, "a number between 0 and 1, or null"),
    "label_map": (lambda v: isinstance(v, list) and all(map(_NATURAL[0], v)), "class numbers"),
    "protocol": (
        lambda v: v in (None, "paper", "released", "ten-percent", "bench", "custom"),  # bench: an old ten-percent
        "paper, released, ten-percent, custom, or null",
    ),
    "selection": (lambda v: v in (None, "exact", "coin"), "exact, coin, or null"),
    "poisoned": _NATURAL,
    "covers": _NATURAL,
    "encoding": (_is_encoding, "kind raw, or kind jpeg with quality (1 to 100) and subsampling"),
    "encoding_psnr_db": (_is_figure, "a number, or null"),
    "stealth": (lambda v: v is None or _is_map(v, _is_figure), "numbers, by name, or null"),
    "content_hash": (lambda v: _is_map(v, _is_sha256), "64 hexadecimal digits, by split"),
    "data_hash": SHA256,
    "files": (_is_files, "{bytes, sha256}, by file name"),
    "versions": (lambda v: _is_map(v, lambda item: isinstance(item, str)), "strings, by package"),
    "skipped": (_is_strings, "a list of strings"),
    "conversions": (lambda v: _is_map(v, _POSITIVE[0]), "whole numbers above 0, by conversion"),
    "notes": (_is_strings, "a list of strings"),
}


def check_together(content: Mapping[str, Any], path: Path) -> None:
    """What no single field can tell."""

    def bad(what: str) -> UserError:
        return UserError(what, where=path, hint=AGAIN)

    if len(set(content["class_names"])) != len(content["class_names"]):
        raise bad("field class_names holds a name twice")
    if len(content["class_names"]) != content["num_classes"]:
        raise bad(
            f"field class_names holds {len(content['class_names'])} names, num_classes says {content['num_classes']}"
        )
    attacked = content["attack"]["kind"] != "clean"
    splits = {"train", "test"} | ({"test_triggered"} if attacked else set())
    splits |= set() if content["holdout_clean"] is None else {"holdout"}
    for field in ("counts", "content_hash"):
        if set(content[field]) != splits:
            raise bad(f"field {field} is about {', '.join(sorted(content[field]))}, not {', '.join(sorted(splits))}")
    missing = {"samples.parquet", *(f"{split}.beton" for split in splits)} - set(content["files"])
    if missing:
        raise bad(f"field files lacks {sorted(missing)[0]}")
    if content["target"] is not None and content["target"] >= content["num_classes"]:
        raise bad(f"field target is {content['target']}, no class")
    if len(content["label_map"]) not in (0, content["num_classes"]) or bool(content["label_map"]) != attacked:
        raise bad(f"field label_map holds {len(content['label_map'])} labels")
    if any(label >= content["num_classes"] for label in content["label_map"]):
        raise bad(f"field label_map holds {max(content['label_map'])}, no class")
    poisoned, covers = content["poisoned"], content["covers"]
    if poisoned + covers > content["counts"]["train"]:
        raise bad(f"fields poisoned and covers are {poisoned} and {covers}, more than the training images")
    for field in ("rate", "protocol", "selection", "stealth"):
        if (content[field] is not None) != attacked:
            raise bad(f"field {field} is {content[field]!r}, and the attack is {content['attack']['kind']}")
    if content["encoding_psnr_db"] is not None and content["encoding"] == RAW:
        raise bad(f"field encoding_psnr_db is {content['encoding_psnr_db']}, and the encoding loses nothing")
    if data_hash(content["content_hash"]) != content["data_hash"]:
        raise bad("field data_hash is not that of content_hash")
