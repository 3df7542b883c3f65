"""`dbd reproduce TABLE`: the runs of a whole table, and the table."""

from __future__ import annotations

import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep.errors import UserError
from dbd_dist.launch.start import STORAGE, check_storage
from dbd_dist.reproduce import collect, cost, formats, jobs
from dbd_dist.reproduce.grid import FOLDER, Place, Plan, Task, plan
from dbd_dist.reproduce.table import BUILT_IN, Table, find_table, narrowed


@dataclass(frozen=True, kw_only=True)
class Arguments:
    table: Annotated[str, tyro.conf.Positional]
    """A built-in table, or a .toml or .json file with attacks, methods, preset and seeds (docs/usage.md)."""
    preset: str | None = None
    """Settings of all runs; `dbd train --help` lists presets. Default: the table's, or demo."""
    source: str | None = None
    """Images, as arguments of `dbd prepare`: "parquet --root FOLDER". Default: the table's, or the preset's own."""
    attacks: tuple[str, ...] | None = None
    """Only these attacks of the table."""
    methods: tuple[str, ...] | None = None
    """Only these methods of the table."""
    seeds: tuple[int, ...] | None = None
    """Instead of the table's, which are 0 1 2 unless a file says otherwise."""
    dry_run: bool = False
    """Say what there is, what is missing and what that costs here; make nothing."""
    storage: Path = STORAGE
    """Where data sets, artefacts and runs lie. Default: $DBD_STORAGE, or runs/."""
    out: Path | None = None
    """Folder of the table in all formats and of one JSON a result. Default: STORAGE/reproduce/TABLE-PRESET."""
    launcher: Literal["local", "ray"] = "local"
    """local: each run in one process of this machine. ray: each run on Ray Train workers, of the cluster that this
    process belongs to or of a Ray of this machine's own."""
    jobs: int | None = None
    """Runs at a time. Default: local 1, ray as many as the cluster has room for."""

    def __post_init__(self):
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"{self.jobs} is not allowed", where="--jobs", expected="a number >= 1")


def main(argv: list[str]) -> int:
    """Plan, make what is missing, write the table."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd reproduce", description=_description())
    source = shlex.split(arguments.source or "")
    table = find_table(arguments.table, preset_name=arguments.preset, source=source)
    table = narrowed(table, attacks=arguments.attacks, methods=arguments.methods, seeds=arguments.seeds)
    out = arguments.out or arguments.storage / FOLDER / f"{table.name}-{table.preset}"
    whole = plan(table, _local(arguments))
    print("\n".join(cost.describe(whole)), flush=True)
    if arguments.dry_run:
        print(f"\n{cost.listing(whole)}")
        return 0
    check_storage(arguments.storage)
    whole, failed = _make(table, whole, arguments) if whole.tasks else (whole, {})
    collect.write_results(whole, out, f"dbd reproduce {shlex.join(argv)}")
    made = collect.read(out)
    paths = formats.write(made, out)
    print(f"\n{formats.as_markdown(made, with_commands=False)}\n{out}: {', '.join(path.name for path in paths)}")
    for name, message in failed.items():
        print(f"failed: {name}: {message}", file=sys.stderr)
    return 1 if failed else 0


def _description() -> str:
    lines = [f"  {name}: {title} ({', '.join(cases)})" for name, (title, cases, _) in BUILT_IN.items()]
    opening = "Make every run of a table and write it as Markdown, LaTeX, CSV and HTML. The same command resumes."
    return "\n".join([opening, "", "Tables:", *lines])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local(arguments: Arguments) -> Place:
    if arguments.launcher == "ray":
        return Place(storage=arguments.storage, launcher="ray")
    return Place(storage=arguments.storage, threads=max(_cores() // (arguments.jobs or 1), 1))


def _make(table: Table, whole: Plan, arguments: Arguments) -> tuple[Plan, dict[str, str]]:
    """Run what is missing; the plan as it ran, and what failed, with its last message, by the command's name."""
    with ExitStack() as around:
        count = arguments.jobs or 1
        if arguments.launcher == "ray":
            place, count = around.enter_context(_ray_place(whole, arguments))
            whole = plan(table, place)  # its commands say what Ray sets aside
        else:
            os.environ.setdefault("OMP_NUM_THREADS", str(whole.place.threads))  # for crafting, in new processes
        progress = _Progress(table.name, len(whole.tasks))
        jobs.run_tasks(whole.tasks, jobs=count, report=progress)
        return whole, progress.failed


def _ray_place(whole: Plan, arguments: Arguments):
    from dbd_dist.reproduce.room import ray_place

    return ray_place(whole, arguments.jobs)


class _Progress:
    """A line at the end of every command; keeps what failed, and ends a table whose data cannot be made."""

    def __init__(self, table: str, total: int):
        self._table, self._total, self._count, self._start = table, total, 0, time.monotonic()
        self._trained = False
        self.failed: dict[str, str] = {}

    def __call__(self, task: Task, code: int) -> None:
        """Take note of a task's end.

        Raises:
            UserError: a data set cannot be made as the table has it, and nothing is trained yet.
        """
        self._count += 1
        self._trained |= task.argv[0] == "train" and code != jobs.SKIPPED
        state = "done" if code == 0 else "left out: what it needs failed" if code == jobs.SKIPPED else f"exit {code}"
        if code != 0:
            self.failed[task.name] = state if code == jobs.SKIPPED else _message(task)
        if code == 2 and task.argv[0] == "prepare" and not self._trained:
            what = self.failed[task.name].removeprefix("error: ")
            raise UserError(what, where=f"{self._table}: {task.name}", hint="correct the table: nothing is trained yet")
        seconds = time.monotonic() - self._start
        print(f"[{self._count}/{self._total}, {seconds:.0f} s] {task.argv[0]} {task.name}: {state}", flush=True)


def _message(task: Task) -> str:
    """The last error message in a task's log."""
    lines = task.log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    return f"{(errors or lines or ['no output'])[-1]} ({task.log})"
