"""Fields of a space that varies an attack: those of the craft, of `dbd prepare`, and of the defence's runs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from data_prep.errors import UserError
from dbd_dist.craft.adaptive import Adaptive
from dbd_dist.fields import from_dict
from tune_spaces.space import Distribution

PREPARE = ("rate",)
"""Fields of `dbd prepare` that can vary: "prepare.rate"."""
OF_FIXED_MASK = ("alpha", "patch_px")
OF_OPTIMISED_MASK = ("mask_budget",)


def of_training(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that belong to a run's configuration."""
    return {field: value for field, value in values.items() if field.partition(".")[0] not in ("craft", "prepare")}


def of_attack(values: Mapping[str, Any]) -> dict[str, Any]:
    """The others: what belongs to the craft and to `dbd prepare`."""
    return {field: value for field, value in values.items() if field not in of_training(values)}


def craft_of(values: Mapping[str, Any], *, target: int, seed: int) -> Adaptive:
    """The craft with these values; those that its kind of mask does not have are left out.

    Raises:
        UserError: a value is not allowed.
    """
    chosen = {field[6:]: value for field, value in values.items() if field.startswith("craft.")}
    optimises = chosen.get("optimise", Adaptive.optimise) == "pattern-and-mask"
    for name in OF_FIXED_MASK if optimises else OF_OPTIMISED_MASK:
        chosen.pop(name, None)
    return from_dict(Adaptive, {**chosen, "target": target, "seed": seed}, where="craft")


def rate_of(values: Mapping[str, Any]) -> float | None:
    """The poison rate; None for the protocol's."""
    return values.get("prepare.rate")


def check_attack(vary: Mapping[str, Distribution], fixed: Mapping[str, Any]) -> None:
    """Refuse fields and values that the craft or `dbd prepare` do not have.

    Raises:
        UserError: with the nearest name.
    """
    names = [f"craft.{f.name}" for f in dataclasses.fields(Adaptive) if f.name not in ("target", "seed")]
    names += [f"prepare.{name}" for name in PREPARE]
    every = {field: given.bounds() for field, given in vary.items()} | {field: (v,) for field, v in fixed.items()}
    for field, values in every.items():
        if field.partition(".")[0] not in ("craft", "prepare"):
            continue
        if field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            hint = f"did you mean {near[0]}?" if near else None
            raise UserError("there is no such field", where=field, expected=", ".join(names), hint=hint)
        for value in values:
            if field == "prepare.rate":
                if not isinstance(value, int | float) or not 0 < value < 1:
                    raise UserError(f"{value!r} is not allowed", where=field, expected="a number above 0 and below 1")
            else:
                kind = "pattern-and-mask" if field[6:] in OF_OPTIMISED_MASK else "pattern"
                craft_of({"craft.optimise": kind, field: value}, target=0, seed=0)
