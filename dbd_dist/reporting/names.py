"""Titles of methods and stages, as a run recorded them in its run.json and result.json.

Not from the registries: importing those loads torch, which takes longer than a table, and a run can be reported where
its method is not installed. A name without a title stands for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BEFORE = {
    "none": "No defence",
    "dbd": "DBD",
    "simclr": "Self-supervised pretraining",
    "warmup": "Head warm-up",
    "mixmatch": "Semi-supervised fine-tuning",
    "supervised": "Plain supervised training",
}
"""Titles in runs of version 0.1, which recorded none."""
_SETTINGS_BEFORE = {
    "none": ("model", "supervised"),
    "dbd": ("model", "simclr", "warmup", "split", "mixmatch"),
}
"""Which parts of a configuration a result depends on in runs of version 0.1, which recorded those of all methods."""


def title(name: str, record: Mapping[str, Any]) -> str:
    """The title of a method or stage; not escaped.

    Args:
        record: run.json, or result.json.
    """
    titles = record.get("titles")
    found = titles.get(name) if isinstance(titles, Mapping) else _BEFORE.get(name)
    return found if isinstance(found, str) else name


def defends(method: str, record: Mapping[str, Any]) -> bool:
    """Is a method a defence, or the baseline that defences are compared with?

    Args:
        record: result.json; version 0.1 had no field `defends`.
    """
    recorded = record.get("defends")
    return recorded if isinstance(recorded, bool) else method != "none"


def needs_clean(record: Mapping[str, Any]) -> bool:
    """Did a method have clean images of the defender's own?

    Args:
        record: result.json; early versions had no such method.
    """
    return record.get("needs_clean") is True


def changes_input(method: str, record: Mapping[str, Any]) -> bool:
    """Does a method change images at test time, so that measures between epochs are not its own?

    Args:
        record: result.json; early versions had no field `changes_input`.
    """
    recorded = record.get("changes_input")
    return recorded if isinstance(recorded, bool) else method == "shrinkpad"


def is_setting(part: str, method: str, record: Mapping[str, Any]) -> bool:
    """Does a result of the method depend on that part of its configuration?

    Args:
        record: run.json.
    """
    return "titles" in record or method not in _SETTINGS_BEFORE or part in _SETTINGS_BEFORE[method]
