"""What a table is: attacks, methods, a preset and seeds; the built-in ones, and those that a file describes."""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.attacks import ATTACKS
from data_prep.errors import UserError
from data_prep.io.json import parse_json
from data_prep.io.limits import JSON_BYTES, read_limited
from dbd_dist.commands.prepare import add_crafted
from dbd_dist.fields import digest
from dbd_dist.methods import METHODS
from dbd_dist.methods.method import HOLDOUT_CLEAN
from dbd_dist.presets import PRESETS, preset
from dbd_dist.reproduce import quirks
from dbd_dist.reproduce.cases import Case, find_case


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method, perhaps with flags of its own: a row of every attack."""

    name: str
    method: str
    flags: tuple[str, ...] = ()
    """Of `dbd train`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A grid of runs."""

    name: str
    title: str
    preset: str = "demo"
    source: tuple[str, ...] = ()
    """Arguments of `dbd prepare`, from the source's name on; empty for the preset's."""
    cases: tuple[Case, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    holdout_clean: float | None = HOLDOUT_CLEAN
    """Share of clean images set aside in every data set, so that all methods train on the same images."""
    flags: tuple[str, ...] = ()
    """Of every `dbd train`."""
    detects: bool = False
    """Shows how well poisoned samples are ranked and found, and how features group them."""


POISON_LABEL = ("badnets", "blended", "wanet")
ATTACKED = (*POISON_LABEL, "label-consistent")
DEFENCES = ("none", "dpsgd", "shrinkpad", "nc", "nad", "spectral", "activation-clustering", "abl", "dbd")
ABLATION = ("none", "dbd-no-ssl", "ssl-ce", "ssl-sce", "ssl-sce-tuned", "dbd")

BUILT_IN: Mapping[str, tuple[str, tuple[str, ...], tuple[str | Mapping[str, Any], ...]]] = {
    "main": ("Defences under each attack", ("clean", *ATTACKED, "adaptive"), DEFENCES),
    "ablation": ("What each part of DBD contributes", ATTACKED, ABLATION),
    "adaptive": (
        "Attacks that aim at the defence",
        ("adaptive", "adap-blend", "adap-patch", "ctrl"),
        ("none", "spectral", "activation-clustering", "dbd", "dbd-robust"),
    ),
    "rates": (
        "Poisoning rates",
        tuple(f"{name}{rate}" for name in POISON_LABEL for rate in ("-r0.01", "", "-r0.1", "-r0.2")),
        ("none", "dbd"),
    ),
    "filter": (
        "How well poisoned samples are found",
        ("clean", *ATTACKED, "adaptive"),
        ("nc", "spectral", "activation-clustering", "abl", "dbd", "dbd-robust"),
    ),
    "attacks": (
        "Every attack without and with DBD",
        (
            "clean", "badnets", "badnets-all-to-all", "blended", "wanet", "wanet-10", "wanet-no-noise",
            "label-consistent", "adaptive", "sig", "ctrl", "adap-blend", "adap-patch",
        ),
        ("none", "dbd"),
    ),
    "quirks": ("What each quirk of the released code costs", quirks.CASES, quirks.ROWS),
}  # fmt: skip
"""Name -> title, attacks, and the methods that are wanted, as a table file has them: those that are not installed are
left out with a note."""

DETECTS = ("ablation", "filter")
"""Built-in tables with `Table.detects`."""

FIELDS = ("title", "preset", "source", "attacks", "methods", "seeds", "holdout_clean", "flags", "detects")
"""Of a table file."""


def find_table(name: str, *, preset_name: str | None = None, source: Sequence[str] = ()) -> Table:
    """A built-in table, or the one that a TOML or JSON file describes.

    Args:
        preset_name: instead of the table's.
        source: instead of the table's; see `Table.source`.

    Raises:
        UserError: there is no such table or file, or it names what there is not.
    """
    add_crafted()
    path = Path(name)
    if name in BUILT_IN:
        title, cases, wanted = BUILT_IN[name]
        return _table(
            name,
            {
                "title": title, "attacks": list(cases), "methods": _installed(name, wanted),
                "detects": name in DETECTS,
            },
            f"the table {name}", preset_name, source,
        )  # fmt: skip
    if path.suffix not in (".toml", ".json") and not path.exists():
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise UserError(
            f"there is no table {name!r}",
            where="dbd reproduce",
            expected=f"{', '.join(BUILT_IN)}, or a .toml or .json file",
            hint=f"did you mean {near[0]!r}" if near else None,
        )
    return _table(path.stem, _read(path), str(path), preset_name, source)


def _installed(table: str, wanted: Sequence[str | Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    methods = [entry if isinstance(entry, str) else entry["method"] for entry in wanted]
    missing = [name for name in dict.fromkeys(methods) if name not in METHODS]
    if missing:
        print(f"note: {table} leaves out {', '.join(missing)}: no such method is installed", file=sys.stderr)
    return [entry for entry, name in zip(wanted, methods) if name in METHODS]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = read_limited(path, JSON_BYTES).decode()
        values = parse_json(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from error
    except (ValueError, RecursionError) as error:  # tomllib's and Unicode's are ValueErrors
        raise UserError(f"not {'JSON' if path.suffix == '.json' else 'TOML'} ({error})", where=path) from error
    if not isinstance(values, dict):
        raise UserError("not a table file", where=path, expected=f"an object with {', '.join(FIELDS)}")
    return values


def _table(name: str, values: Mapping[str, Any], where: str, preset_name: str | None, source: Sequence[str]) -> Table:
    _check_fields(values, FIELDS, where)
    for needed in ("attacks", "methods"):
        if not isinstance(values.get(needed), list) or not values[needed]:
            raise UserError(f"no list {needed}", where=where, expected=f"{needed} = [...], with at least one name")
    chosen = preset_name or _typed(values, "preset", str, "demo", where)
    if chosen not in PRESETS:
        near = difflib.get_close_matches(chosen, PRESETS, n=1)
        raise UserError(
            f"there is no preset {chosen!r}",
            where="--preset" if preset_name else f"{where}: preset",
            expected=", ".join(PRESETS),
            hint=f"did you mean {near[0]!r}" if near else None,
        )
    given = tuple(source) or _strings(values, "source", where)
    images = given[0] if given else preset(chosen).prepare.source.name
    seeds = _typed(values, "seeds", list, [0, 1, 2], where)
    holdout = values.get("holdout_clean", HOLDOUT_CLEAN)
    if not isinstance(holdout, int | float) or isinstance(holdout, bool) or not 0 <= holdout < 1:
        raise UserError(f"holdout_clean is {holdout!r}", where=where, expected="a share from 0 (none) to below 1")
    return Table(
        name=name,
        title=_typed(values, "title", str, name, where),
        preset=chosen,
        source=given,
        cases=_unique([_case(entry, images, where) for entry in values["attacks"]], where),
        variants=_unique([_variant(entry, where) for entry in values["methods"]], where),
        seeds=check_seeds(seeds, f"{where}: seeds"),
        holdout_clean=float(holdout) or None,
        flags=_strings(values, "flags", where),
        detects=_typed(values, "detects", bool, False, where),
    )


def check_seeds(seeds: Sequence[Any], where: str) -> tuple[int, ...]:
    """Seeds, each once.

    Raises:
        UserError: none, or one that is no whole number from 0.
    """
    if not seeds or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds):
        raise UserError(f"{list(seeds)!r}", where=where, expected="whole numbers from 0, at least one")
    return tuple(dict.fromkeys(seeds))


def _check_fields(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"there is no field {name!r}",
                where=where,
                expected=", ".join(known),
                hint=f"did you mean {near[0]!r}" if near else None,
            )


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any, where: str) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind):
        expected = {str: "a string", list: "a list", bool: "true or false"}[kind]
        raise UserError(f"{name} is {value!r}", where=where, expected=expected)
    return value


def _strings(values: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UserError(f"{name} is {found!r}", where=where, expected='a list of strings, such as ["--rate", "0.1"]')
    return tuple(found)


def _case(entry: Any, source: str, where: str) -> Case:
    """An attack's name, or an object with name, attack, flags, craft and title."""
    if isinstance(entry, str):
        return find_case(entry, source, where=where)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{entry!r} names no attack", where=where, expected="a name, or an object with a name")
    _check_fields(entry, ("name", "attack", "flags", "craft", "title"), f"{where}: {entry['name']}")
    attack = _typed(entry, "attack", str, entry["name"], where)
    ATTACKS.find(attack, where=where)
    check_folder_name(entry["name"], where)
    return Case(
        name=entry["name"],
        title=_typed(entry, "title", str, entry["name"], where),
        attack=attack,
        flags=_strings(entry, "flags", where),
        craft=_strings(entry, "craft", where),
        own=True,
    )


def _variant(entry: Any, where: str) -> Variant:
    """A method's name, or an object with name, method and flags."""
    if isinstance(entry, str):
        METHODS.find(entry, where=where)
        return Variant(name=entry, method=entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{entry!r} names no method", where=where, expected="a name, or an object with a name")
    _check_fields(entry, ("name", "method", "flags"), f"{where}: {entry['name']}")
    method = _typed(entry, "method", str, entry["name"], where)
    METHODS.find(method, where=where)
    check_folder_name(entry["name"], where)
    return Variant(name=entry["name"], method=method, flags=_strings(entry, "flags", where))


def check_folder_name(name: str, where: str) -> None:
    """Refuse a name that is no folder's.

    Raises:
        UserError
    """
    if not name or name.startswith(".") or not all(c.isalnum() or c in "-_.=+" for c in name) or len(name) > 80:
        expected = "letters, digits, - _ . = +, at most 80, the first no dot"
        raise UserError(f"{name!r} names no folder", where=where, expected=expected)


def _unique(parts: Sequence[Any], where: str) -> tuple[Any, ...]:
    names = [part.name for part in parts]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{twice[0]!r} is there twice", where=where, expected="each name once")
    return tuple(parts)


def narrowed(
    table: Table,
    *,
    attacks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Table:
    """A part of the table, in its order.

    Raises:
        UserError: an attack or method that the table does not have.
    """

    def chosen(parts: tuple[Any, ...], wanted: Sequence[str] | None, flag: str) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        for name in wanted or ():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise UserError(
                    f"{table.name} has no {name!r}",
                    where=flag,
                    expected=", ".join(names),
                    hint=f"did you mean {near[0]!r}" if near else None,
                )
        return tuple(part for part in parts if wanted is None or part.name in wanted)

    return replace(
        table,
        cases=chosen(table.cases, attacks, "--attacks"),
        variants=chosen(table.variants, methods, "--methods"),
        seeds=table.seeds if seeds is None else check_seeds(seeds, "--seeds"),
    )


def variant_key(variant: Variant, flags: Sequence[str]) -> str:
    """Names the folder of a variant's runs: with the flags where there are any."""
    every = [*flags, *variant.flags]
    return f"{variant.name}-{digest(every)[:6]}" if every else variant.name
