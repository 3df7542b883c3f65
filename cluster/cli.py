"""`dbd cluster`: files for clusters."""

from __future__ import annotations

import difflib
import importlib

from data_prep.errors import UserError

COMMANDS = {
    "render": ("cluster.render", "the file for a kind of cluster: aws, kuberay-rayjob, slurm, ..."),
    "validate": ("cluster.validate", "check such a file before it costs machine time"),
    "bundle": ("cluster.bundle", "everything to install this project on hosts without network"),
}


def main(argv: list[str]) -> int:
    """Run one of the subcommands.

    Raises:
        UserError: there is none of that name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{phrase}" for name, (_, phrase) in COMMANDS.items()]
        print("\n".join(["usage: dbd cluster COMMAND ...", "", *lines]))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        raise UserError(
            f"there is no command {argv[0]!r}",
            where="dbd cluster",
            expected=", ".join(COMMANDS),
            hint=f"did you mean {near[0]!r}" if near else None,
        )
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
