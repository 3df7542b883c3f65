"""`dbd prepare`: the command line of `prepare`."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, Union

import tyro

from data_prep.attacks import ATTACKS, NoAttack
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import Manifest
from data_prep.errors import UserError, printable
from data_prep.pipeline import prepare
from data_prep.registry import Registry
from data_prep.sources import SOURCES


def command() -> type[PrepareConfig]:
    """`PrepareConfig` with a subcommand for each source and each attack that is registered."""
    parts = [
        ("source", _subcommands(SOURCES), field()),
        ("attack", _subcommands(ATTACKS), field(default_factory=NoAttack)),
    ]
    made = make_dataclass("PrepareConfig", parts, bases=(PrepareConfig,), frozen=True, kw_only=True)
    made.__doc__ = PrepareConfig.__doc__
    return made


def _subcommands(registry: Registry[type[Any]]) -> Any:
    return Union[tuple(Annotated[part, tyro.conf.subcommand(name)] for name, part in registry.items())]  # noqa: UP007


def parse(argv: list[str]) -> PrepareConfig:
    """The config of a command line.

    Raises:
        UserError: flags that contradict each other.
        SystemExit: flags that do not parse (2), or --help (0).
    """
    arguments, notes = _renamed(_with_path(argv))
    parsed = tyro.cli(
        command(),
        prog="dbd prepare",
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.CascadeSubcommandArgs,
        ),
    )
    config = PrepareConfig(**{f.name: getattr(parsed, f.name) for f in fields(PrepareConfig)})
    for name in ("rate", "target", "protocol"):
        if not config.has_attack and getattr(config, name) != getattr(PrepareConfig, name):
            raise UserError(
                f"a {name} is given, and no attack",
                where=name,
                expected=f"no {name}, or an attack",
                hint="name an attack after the source, e.g. badnets",
            )
    for note in notes:  # here, so that a refusal is one message
        print(f"note: {note}", file=sys.stderr)
    return config


def _with_path(argv: list[str]) -> list[str]:
    """`hf PATH_OR_NAME` with the flag that it stands for."""
    if len(argv) > 1 and argv[0] == "hf" and not argv[1].startswith("-") and "--path" not in argv:
        return ["hf", "--path", *argv[1:]]
    return argv


def _renamed(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags, with the old names of --protocol and of what it takes replaced, and notes that say so."""
    notes: list[str] = []
    names = [arg.partition("=")[0] for arg in argv]
    if "--setting" in names:
        if "--protocol" in names:
            raise UserError("both --setting and --protocol are given", hint="leave out --setting, its old name")
        notes.append("--setting is called --protocol now")
        argv = [re.sub("^--setting", "--protocol", arg) if n == "--setting" else arg for arg, n in zip(argv, names)]
    renamed = [
        "--protocol=ten-percent" if arg == "--protocol=bench" else
        "ten-percent" if (before, arg) == ("--protocol", "bench") else arg
        for before, arg in zip(["", *argv], argv)
    ]  # fmt: skip
    if renamed != argv:
        notes.append("--protocol bench is called ten-percent now, as it is no benchmark's")
    return renamed, notes


def as_typed(error: UserError) -> UserError:
    """The error with its fields called as the flags that were typed."""
    parts = [PrepareConfig, *SOURCES.values(), *ATTACKS.values()]
    names = {f.name for part in parts for f in fields(part)}

    def flags(text: str | None) -> str | None:
        if text is None:
            return None
        for name in names:
            if "_" in name:
                text = re.sub(rf"(?<![\w/'-]){name}\b", f"--{name.replace('_', '-')}", text)
        return text

    where = error.where
    if isinstance(where, str):
        where = ", ".join(f"--{n.replace('_', '-')}" if n in names else n for n in where.split(", "))
    return UserError(flags(error.what) or "", where=where, expected=flags(error.expected), hint=flags(error.hint))


def _aim(manifest: Manifest) -> str:
    """Which class the attack aims at, where it aims at one."""
    if manifest.target is None:
        return ""
    number, name = str(manifest.target), printable(manifest.class_names[manifest.target])
    return f" for class {number}" + (f", {name}" if name != number else "")


def main(argv: list[str]) -> int:
    """Run ``dbd prepare SOURCE [ATTACK] [OPTIONS]``; returns the exit code.

    Raises:
        UserError: anything that the user can mend.
        SystemExit: flags that do not parse (2), or --help (0).
    """
    start = time.monotonic()
    try:
        dataset = prepare(parse(argv))
    except UserError as error:
        raise as_typed(error) from error
    manifest, seconds = dataset.manifest, time.monotonic() - start
    size = sum(record.bytes for record in manifest.files.values())
    counts = manifest.counts
    poison = f" ({manifest.poisoned:,} poisoned{_aim(manifest)})" if manifest.has_attack else ""
    clean = f", {counts['holdout']:,} clean set aside" if "holdout" in counts else ""
    left_out = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
    if manifest.conversions:
        done = ", ".join(f"{count:,} {what}" for what, count in sorted(manifest.conversions.items()))
        print(f"note: images converted: {done}", file=sys.stderr)
    print(
        f"{dataset.folder}: {counts['train']:,} training{poison}{clean} and {counts['test']:,} test images "
        f"of {manifest.image_px} px, {manifest.num_classes} classes{left_out}; "
        f"{size / 2**20:,.1f} MiB, {seconds:.1f} s"
    )
    return 0
