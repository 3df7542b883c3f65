"""`dbd submit -- COMMAND ...`: a command of this project as a job on a running Ray cluster."""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cluster import jobs
from data_prep.errors import UserError

COMMANDS = ("train", "tune", "craft", "prepare", "evaluate", "report", "demo", "bench", "doctor")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run a command on a cluster as a job, follow its log, and end with its exit code. Ctrl-C detaches."""

    address: str | None = None
    """The dashboard's address. Default: $RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."""
    working_dir: Path | None = None
    """Folder to send along. Default: this project, where dbd runs from a checkout; else none."""
    pip: tuple[str, ...] = ()
    """Requirements to install for the job there, such as a wheel's path or address."""
    env: tuple[str, ...] = ()
    """Variables for the job, NAME=VALUE."""
    python: str = "python"
    """The interpreter there, with a path where it is not on the PATH that `ray start` had."""
    cpus: float | None = None
    """CPUs to reserve for the command itself, which trains nothing."""
    memory_gib: float | None = None
    """Memory to reserve for it."""
    detach: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Do not follow the log."""
    follow: str | None = None
    """Follow a job that runs, by its id, and submit nothing."""


def main(argv: list[str]) -> int:
    """Submit; returns the exit code of the job.

    Raises:
        UserError: the address, the token or the command is wrong; nothing has been started.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:at], argv[at + 1 :]
    if "-h" not in own and "--help" not in own and at == len(argv) and "--follow" not in " ".join(own):
        raise UserError("no command is given", where="dbd submit", expected="dbd submit [FLAGS] -- train PRESET ...")
    arguments = tyro.cli(Arguments, args=own, prog="dbd submit")
    address = jobs.address_from(arguments.address, os.environ)
    os.environ.update(jobs.token_env(os.environ, Path.home()))
    if arguments.follow is not None:
        jobs.check(address, os.environ)
        return jobs.follow_job(address, arguments.follow)
    job = _job(arguments, command)
    jobs.check(address, os.environ)
    return jobs.submit(address, job, follow=not arguments.detach)


def _job(arguments: Arguments, command: list[str]) -> jobs.Job:
    if command[:1] == ["dbd"]:
        command = command[1:]
    if not command or command[0] not in COMMANDS:
        near = difflib.get_close_matches(command[0], COMMANDS, n=1) if command else []
        raise UserError(
            f"there is no command {command[0]!r}" if command else "no command is given",
            where="dbd submit --",
            expected=", ".join(COMMANDS),
            hint=f"did you mean {near[0]!r}" if near else None,
        )
    folder = arguments.working_dir if arguments.working_dir is not None else _checkout()
    if folder is not None and not folder.expanduser().is_dir():
        raise UserError("is no folder", where=f"--working-dir {folder}")
    pairs = [pair.partition("=") for pair in arguments.env]
    for name, equals, value in pairs:
        if not name or not equals:
            raise UserError(f"{name + equals + value!r} is not allowed", where="--env", expected="NAME=VALUE")
    return jobs.Job(
        command=[arguments.python, "-m", "dbd_dist", *command],
        working_dir=None if folder is None else folder.expanduser().resolve(),
        pip=arguments.pip,
        env={name: value for name, _, value in pairs},
        num_cpus=arguments.cpus,
        memory_gib=arguments.memory_gib,
    )


def _checkout() -> Path | None:
    """The project's folder, where this file lies in one."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "cluster").is_dir() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
