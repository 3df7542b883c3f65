"""`dbd prepare`: the command line of `prepare`."""

from __future__ import annotations

import time
from dataclasses import field, make_dataclass
from typing import Annotated, Union

import tyro

from data_prep.attacks import ATTACKS, NoAttack
from data_prep.errors import UserError
from data_prep.pipeline import PrepareConfig, prepare


def command() -> type[PrepareConfig]:
    """`PrepareConfig` with a subcommand for each attack of the registry."""
    parts = [Annotated[attack, tyro.conf.subcommand(name)] for name, attack in ATTACKS.items()]
    attack = ("attack", Union[tuple(parts)], field(default_factory=NoAttack))  # noqa: UP007
    made = make_dataclass("PrepareConfig", [attack], bases=(PrepareConfig,), frozen=True, kw_only=True)
    made.__doc__ = PrepareConfig.__doc__
    return made


def main(argv: list[str]) -> int:
    """Run ``dbd prepare SOURCE [ATTACK] [OPTIONS]``; returns the exit code.

    Raises:
        UserError: anything that the user can mend.
        SystemExit: flags that do not parse (2), or --help (0).
    """
    config = tyro.cli(
        command(),
        prog="dbd prepare",
        args=argv,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.CascadeSubcommandArgs,
        ),
    )
    for name, unset in (("rate", None), ("target", None), ("setting", PrepareConfig.setting)):
        if not config.has_attack and getattr(config, name) != unset:
            raise UserError(
                f"{name} {getattr(config, name)} is given, and no attack",
                where=name,
                expected=f"no {name}, or an attack",
                hint="name an attack after the source, e.g. badnets",
            )
    start = time.monotonic()
    dataset = prepare(config)
    manifest, seconds = dataset.manifest, time.monotonic() - start
    size = sum(record.bytes for record in manifest.files.values())
    counts = manifest.counts
    poison = f" ({manifest.poisoned:,} poisoned)" if manifest.has_attack else ""
    left_out = f", {len(manifest.skipped)} unreadable images left out" if manifest.skipped else ""
    print(
        f"{dataset.folder}: {counts['train']:,} training{poison} and {counts['test']:,} test images "
        f"of {manifest.image_px} px, {manifest.num_classes} classes{left_out}; "
        f"{size / 2**20:,.1f} MiB, {seconds:.1f} s"
    )
    return 0
