"""Titles and settings of methods and stages: as runs recorded them, else as the registries have them, else the names.

A run records them in its result, so that a report loads no training code, and runs of plugins that are not installed
still report.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

_recorded: dict[str, dict[str, str]] = {}  # method -> titles of its stages; "" is the method's own


def learn(result: Mapping[str, Any]) -> None:
    """Note the titles that a run recorded in its result."""
    stages, title = result.get("stages"), result.get("title")
    if isinstance(title, str) and isinstance(stages, Mapping):
        titles = {str(name): text for name, text in stages.items() if isinstance(text, str)}
        _recorded[str(result["method"])] = titles | {"": title}


@functools.cache
def _registered(method: str) -> dict[str, str]:
    """The same of a method of this installation; nothing where there is none of that name."""
    from dbd_dist.methods import METHODS  # seconds, and only for runs of early versions

    kind = METHODS.get(method)
    if kind is None:
        return {}
    return {name: stage.title for name, stage in kind.stage_kinds().items()} | {"": kind.title}


def _titles(method: str) -> dict[str, str]:
    return _recorded.get(method) or _registered(method)


def method_name(method: str) -> str:
    """The title of a method."""
    return _titles(method).get("", method)


def stage_name(stage: str) -> str:
    """The title of a stage."""
    for titles in _recorded.values():
        if stage in titles:
            return titles[stage]
    return _registered_stages().get(stage, stage)


@functools.cache
def _registered_stages() -> dict[str, str]:
    from dbd_dist.stages import STAGES

    return {name: kind.title for name, kind in STAGES.items()}


def settings_of(method: str) -> tuple[str, ...] | None:
    """The parts of a configuration that a method's result depends on; None where nobody knows the method."""
    titles = _titles(method)
    return ("model", *(name for name in titles if name)) if titles else None


def defends(method: str, recorded: object = None) -> bool:
    """Is a method a defence, or the baseline that others are compared with?

    Args:
        method: its name.
        recorded: field `defends` of its result.json, which runs before that field lack.
    """
    return recorded if isinstance(recorded, bool) else method != "none"
