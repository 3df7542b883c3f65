"""Search spaces by name, from files, and from the command line. A new one is a file beside this one and a line
below."""

from __future__ import annotations

import ast
import importlib.util
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.registry import Registry
from tune_spaces.adaptive import ADAPTIVE
from tune_spaces.defence import DEFENCE
from tune_spaces.filter import FILTER
from tune_spaces.sce import SCE
from tune_spaces.simclr import SIMCLR
from tune_spaces.space import Choice, Distribution, Range, Space, choice, integer, logint, loguniform, uniform

SPACES: Registry[Space] = Registry(
    "spaces",
    {"sce": SCE, "filter": FILTER, "defence": DEFENCE, "simclr": SIMCLR, "adaptive": ADAPTIVE},
    base=Space,
    needs=("vary", "why"),
)

FORMS: dict[str, Callable[..., Distribution]] = {
    "choice": choice, "uniform": uniform, "loguniform": loguniform, "int": integer, "logint": logint,
}  # fmt: skip
EXPECTED = "choice(A, B, ...), uniform(LOW, HIGH), loguniform(LOW, HIGH), int(LOW, HIGH) or logint(LOW, HIGH)"


def space(name: str) -> Space:
    """The space of that name; "NAME+NAME" for several together, "file:PATH" for one in a Python file.

    Raises:
        UserError: there is none, or its file does not import.
    """
    parts = [_of_file(Path(name[5:]))] if name.startswith("file:") else [
        SPACES.find(part, where="dbd tune") for part in name.split("+")
    ]  # fmt: skip
    found = parts[0]
    for other in parts[1:]:
        found = found + other
    return found


def _of_file(path: Path) -> Space:
    """The one space that a Python file defines."""
    where, expected = f"file:{path}", "a Python file with one tune_spaces.space.Space at its top level"
    if not path.is_file():
        raise UserError("there is no such file", where=where, expected=expected)
    spec = importlib.util.spec_from_file_location("dbd_space_of_file", path)
    if spec is None or spec.loader is None:
        raise UserError("is no Python file", where=where, expected=expected)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)), None
        )
        line = getattr(error, "lineno", None) if line is None else line
        place = f"line {line}, " if line is not None else ""
        raise UserError(f"does not import ({place}{type(error).__name__}: {error})", where=where) from error
    found = [value for value in vars(module).values() if isinstance(value, Space)]
    own = [value for value in found if not any(value is other for other in SPACES.values())]
    if len(own or found) != 1:
        raise UserError(f"defines {len(own or found)} spaces", where=where, expected=expected)
    return (own or found)[0]


def assignments(texts: Sequence[str], flag: str) -> dict[str, str]:
    """FIELD=TEXT arguments of a flag.

    Raises:
        UserError: one has no "=", or a field is there twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        field, equals, value = text.partition("=")
        field = field.strip().replace("-", "_")
        if not equals or not field or not value.strip():
            raise UserError(f"{text!r} is not FIELD=VALUE", where=flag, expected="e.g. split.keep=0.5")
        if field in found:
            raise UserError(f"{field} is given twice", where=flag)
        found[field] = value.strip()
    return found


def distribution(text: str, where: str) -> Distribution:
    """A distribution from the command line, such as "uniform(0.2, 0.8)".

    Raises:
        UserError: it cannot be understood, or its bounds are not in order.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.keywords:
            raise ValueError("not of that form")
        name, arguments = call.func.id, [ast.literal_eval(argument) for argument in call.args]
        if name not in FORMS:
            raise ValueError(f"{name} is not known")
        if name != "choice" and (len(arguments) != 2 or not all(type(a) in (int, float) for a in arguments)):
            raise ValueError("two numbers are needed")
        found = FORMS[name](*arguments)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        why = "" if isinstance(error, SyntaxError) else f" ({error})"
        raise UserError(f"{text!r} is not a distribution{why}", where=where, expected=EXPECTED) from error
    check_distribution(found, where)
    return found


def check_distribution(found: Distribution, where: str) -> None:
    """Refuse what cannot be drawn from.

    Raises:
        UserError: no value, bounds out of order, a logarithm of 0 or less, or fractions for whole numbers.
    """
    if isinstance(found, Choice):
        if not found.values:
            raise UserError("choice() has no values", where=where, expected="at least one")
        return
    low, high = found.low, found.high
    if not (math.isfinite(low) and math.isfinite(high)) or low >= high:
        raise UserError(f"{found} is empty", where=where, expected="a low end below the high end")
    if found.log and low <= 0:
        raise UserError(f"{found} has no logarithm at its low end", where=where, expected="a low end above 0")
    if found.whole and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(f"{found} has no whole numbers at its ends", where=where, expected="whole numbers")


def literal(text: str) -> Any:
    """A value from the command line: a number, a list, True, None, or else text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text


def varied(
    chosen: Space, *, smoke: bool, vary: Mapping[str, str], fix: Mapping[str, str]
) -> tuple[dict[str, Distribution], dict[str, Any]]:
    """What a sweep varies and what it fixes: the space's fields, with those of the command line in their place.

    Raises:
        UserError: a distribution cannot be understood, a field is both varied and fixed, or nothing is left to vary.
    """
    found = dict((chosen.smoke or chosen.vary) if smoke else chosen.vary)
    for field, given in found.items():
        if not isinstance(given, Choice | Range):
            raise UserError(f"{given!r} is not a distribution", where=field, expected=EXPECTED)
        check_distribution(given, field)
    both = sorted(set(vary) & set(fix))
    if both:
        raise UserError(f"{both[0]} is varied and fixed", where="--fix", expected="one of the two")
    found |= {field: distribution(text, f"--vary {field}") for field, text in vary.items()}
    fixed = {field: literal(text) for field, text in fix.items()}
    found = {field: given for field, given in found.items() if field not in fixed}
    if not found:
        raise UserError("every field of the space is fixed", where="--fix", hint="use `dbd train` for one run")
    return found, fixed
