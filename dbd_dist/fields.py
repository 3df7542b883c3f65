"""Frozen dataclasses as settings: rules for numbers, plain JSON values, hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from data_prep.errors import UserError

try:
    from tyro.conf import arg
except ImportError:  # a host that trains from Python needs no command line
    FLAT: Any = None
else:
    FLAT = arg(name="")
"""Marks a field whose own fields are flags without a prefix."""

Config = TypeVar("Config")


LARGEST = 1e30
"""Of any setting: sums and products of a few stay far from the largest float."""


def require(config: Any, prefix: str, **rules: str) -> None:
    """Check fields of `config` against rules such as "> 0", "in [0, 1]", "in (0, 1)"."""
    for name, rule in rules.items():
        value = getattr(config, name)
        if value is None:
            continue
        inside = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if inside:
            if rule.startswith("in"):
                low, high = (float(x) for x in rule[4:-1].split(","))
                inside = (low <= value if rule[3] == "[" else low < value) and (
                    value <= high if rule[-1] == "]" else value < high
                )
            else:
                operator, bound = rule.split()
                inside = value > float(bound) if operator == ">" else value >= float(bound)
        if not inside:
            shown = repr(value) if not isinstance(value, int) or abs(value) <= LARGEST else "a number of that length"
            raise UserError(f"{shown} is not allowed", where=f"{prefix}.{name}", expected=f"a number {rule}")


def to_dict(config: Any, *, every_field: bool = False) -> Any:
    """A config as plain JSON values: dataclasses become objects, tuples lists, paths strings. What has a `to_dict`
    of its own says it itself.

    Fields with the metadata `omit_default` are left out at their default, and so are those that the config lists in an
    attribute `unused`: hashes made before there was such a field stay valid. `every_field` keeps them.
    """
    if hasattr(config, "to_dict") and not isinstance(config, type):
        return config.to_dict(every_field=every_field)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: to_dict(getattr(config, f.name), every_field=every_field)
            for f in dataclasses.fields(config)
            if every_field or not _is_omitted(config, f)
        }
    if isinstance(config, tuple | list):
        return [to_dict(v, every_field=every_field) for v in config]
    return str(config) if isinstance(config, Path) else config


def _is_omitted(config: Any, field: dataclasses.Field) -> bool:
    at_default = field.metadata.get("omit_default", False) and getattr(config, field.name) == field.default
    return at_default or field.name in getattr(config, "unused", ())


def from_dict(kind: type[Config], values: Any, where: str = "config") -> Config:
    """The inverse of `to_dict`; fields that are missing take their defaults.

    Raises:
        UserError: an unknown field, or a value of the wrong type, named with its place.
    """
    own = getattr(kind, "from_dict", None)
    return kind(**parse(kind, values, where)) if own is None else own(values, where)


def parse(kind: type, values: Any, where: str) -> dict[str, Any]:
    """The fields of a `kind` from plain JSON values, each of its type.

    Raises:
        UserError: as `from_dict`.
    """
    if not isinstance(values, dict):
        raise UserError(f"{values!r} is not an object", where=where, expected=f"the fields of {kind.__name__}")
    every = get_type_hints(kind)
    hints = {field.name: every[field.name] for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r}", where=where, expected=", ".join(hints))
    return {name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return _value(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{value!r} is not allowed", where=where, expected=", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{value!r} is not a list", where=where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{value!r} has {len(value)} values", where=where, expected=f"{len(kinds)} values")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    if kind is Path and isinstance(value, str):
        try:
            odd = b"\0" in os.fsencode(value)
        except UnicodeEncodeError:
            odd = True
        if odd:
            raise UserError(f"expected a path, got {value!r}", where=where)
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= LARGEST else math.inf if value > 0 else -math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{value!r} is a {type(value).__name__}", where=where, expected=f"a value of type {kind.__name__}"
        )
    return value


def digest(values: Any) -> str:
    """A short stable hash of JSON values or configs; 1 and 1.0 are the same number."""
    text = json.dumps(_numbers(to_dict(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(values: Any) -> Any:
    """JSON values with whole floats as ints: a field of type float may have been given either."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return int(values) if isinstance(values, float) and values.is_integer() else values
