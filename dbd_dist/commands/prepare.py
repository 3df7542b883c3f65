"""`dbd prepare`: the command of data_prep, with the crafted attacks beside its own."""

from __future__ import annotations

import sys

from data_prep import cli
from data_prep.attacks import ATTACKS
from data_prep.errors import UserError


def main(argv: list[str]) -> int:
    """Run ``dbd prepare SOURCE [ATTACK] [OPTIONS]``; returns the exit code."""
    source, attack = [*argv[:2], "", ""][:2]
    if source == "hf" and not attack.startswith("-"):  # its second word is a path
        attack = [*argv[2:3], ""][0]
    if source.startswith("-") or attack not in ATTACKS:  # the others need not wait for torch to be imported
        add_crafted()
    return cli.main(argv)


def add_crafted() -> None:
    """Add the attacks of all crafts to the registry of attacks; one that does not fit is left out with a note."""
    from dbd_dist.craft import CRAFTS

    for name, craft in CRAFTS.items():
        if ATTACKS.get(name) is craft.attack:
            continue
        try:
            ATTACKS.add(name, craft.attack, origin=f"{craft.__module__}.{craft.__qualname__}")
        except UserError as error:
            print(f"note: left out {error}", file=sys.stderr)
