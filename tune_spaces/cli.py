"""`dbd tune SPACE`: a sweep over a space."""

from __future__ import annotations

import tyro

from data_prep.errors import UserError
from tune_spaces.flags import Arguments
from tune_spaces.spaces import SPACES


def main(argv: list[str]) -> int:
    """Run the sweep, print its table and how to retrain the winner."""
    lines = [f"  {name}: {space.why}" for name, space in SPACES.items()]
    description = "\n".join(["Search a space with Ray Tune. Stages that trials share are trained once.", "", *lines])
    arguments = tyro.cli(Arguments, args=argv, prog="dbd tune", description=description)
    _check(arguments)
    from tune_spaces.command import run  # imports torch, for which --help need not wait

    return run(arguments)


def _check(arguments: Arguments) -> None:
    """Numbers that no sweep has.

    Raises:
        UserError
    """
    for flag in ("parallel", "workers", "trials", "grace"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"{value} is not allowed", where=f"--{flag}", expected="a whole number from 1")
    if arguments.reduction < 2:
        raise UserError(f"{arguments.reduction} is not allowed", where="--reduction", expected="a number from 2")
    share = arguments.gpus_per_worker
    if share is not None and not (0 < share <= 1 or (share.is_integer() and share > 0)):
        raise UserError(f"{share} is not allowed", where="--gpus-per-worker", expected="a part of one, or whole GPUs")
    if not arguments.seeds or len(set(arguments.seeds)) != len(arguments.seeds) or min(arguments.seeds) < 0:
        raise UserError(f"{arguments.seeds} is not allowed", where="--seeds", expected="different numbers from 0")
