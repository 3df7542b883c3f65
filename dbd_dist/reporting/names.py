"""Titles, order and settings of methods and stages. A name that is not registered stands for itself, so that runs of
plugins that are not installed still report."""

from __future__ import annotations

_METHODS = {
    "none": ("No defence", ("model", "supervised")),
    "dbd": ("DBD", ("model", "simclr", "warmup", "split", "mixmatch")),
}
_STAGES = {
    "simclr": "Self-supervised pretraining",
    "warmup": "Head warm-up",
    "mixmatch": "Semi-supervised fine-tuning",
    "supervised": "Plain supervised training",
}


def method_name(method: str) -> str:
    """The title of a method."""
    return _METHODS[method][0] if method in _METHODS else method


def stage_name(stage: str) -> str:
    """The title of a stage."""
    return _STAGES.get(stage, stage)


def place(method: str) -> int:
    """Where a method comes in tables: registered ones in their order, then the others."""
    return list(_METHODS).index(method) if method in _METHODS else len(_METHODS)


def settings_of(method: str) -> tuple[str, ...] | None:
    """The parts of a configuration that a method's result depends on; None where the method is not registered."""
    return _METHODS[method][1] if method in _METHODS else None


def defends(method: str, recorded: object = None) -> bool:
    """Is a method a defence, or the baseline that others are compared with?

    Args:
        method: its name.
        recorded: field `defends` of its result.json, which runs before that field lack.
    """
    return recorded if isinstance(recorded, bool) else method != "none"
