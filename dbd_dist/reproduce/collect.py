"""What a table's runs found: one small JSON a result, which every format is made from."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.attacks.protocols import PROTOCOLS
from data_prep.config import PrepareConfig
from data_prep.errors import UserError
from data_prep.io.json import read_json, write_json
from dbd_dist.reporting import names, tables
from dbd_dist.reporting.runs import load_run
from dbd_dist.reproduce.grid import THREADS, Cell, Plan, Task, flag
from dbd_dist.reproduce.table import variant_key

ABOUT = "table.json"
RESULTS = "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method under an attack, over seeds."""

    case: str
    """Its name; of the built-in ones, which the article may have numbers for, where `own` is false."""
    attack: str
    """For people."""
    own: bool
    variant: str
    results: tuple[Mapping[str, Any], ...]
    """By seed."""

    @property
    def method(self) -> str:
        """For people; the variant's name where no run has finished."""
        if not self.results:
            return self.variant
        title = names.title(self.results[0]["method"], self.results[0])
        return title if self.variant == self.results[0]["method"] else f"{title} ({self.variant})"

    @property
    def needs_clean(self) -> bool:
        return bool(self.results) and names.needs_clean(self.results[0])

    def stat(self, field: str) -> tables.Stat | None:
        """Over the results that have the field; "seconds" and "images" are those of all stages, `TARGET_ACC` is of
        the attacker's class, "a.b.0" is a number inside other fields."""
        values = [value_of(result, field) for result in self.results]
        return tables.statistics(values)


TARGET_ACC = "target_acc"
"""Accuracy on clean test images of the class that the attacker wants: where it is low, that class is seldom called, and
a low attack success says little."""


def value_of(result: Mapping[str, Any], field: str) -> float | None:
    """A number of a result.json, by `Row.stat`'s names; None where it has none."""
    if field in ("seconds", "images"):
        return sum(result[field].values()) if result.get(field) else None
    if field == TARGET_ACC:
        target, by_class = target_of(result), result.get("per_class_acc") or []
        return by_class[target] if target is not None and target < len(by_class) else None
    value: Any = result
    for name in field.split("."):
        value = value.get(name) if isinstance(value, Mapping) else value[int(name)] if value else None
    return value


def target_of(result: Mapping[str, Any]) -> int | None:
    """The class that all poisoned images aim at, by the command that poisoned them; None where there is none, or its
    name alone is known."""
    made = [words for words in map(_words, result.get("commands") or ()) if words[:2] == ["dbd", "prepare"]]
    if not made or result.get("asr") is None or flag("--mapping", made[-1]) == "all-to-all":
        return None
    given = flag("--target", made[-1])
    if given is not None:
        return int(given) if given.isdecimal() else None
    named = flag("--protocol", made[-1])
    protocol = next((of for name, of in PROTOCOLS.items() if name == (named or PrepareConfig.protocol)), None)
    return None if protocol is None else protocol.target


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote without an end: not written by `write_results`
        return []


@dataclass(frozen=True, kw_only=True)
class Made:
    """A table with its results."""

    about: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        return [result for row in self.rows for result in row.results]


def write_results(plan: Plan, folder: Path, command: str) -> Path:
    """Write what the finished cells found, and what the table is, for `read`.

    Raises:
        UserError: a file of a run is damaged, or the folder cannot be written.
    """
    table = plan.table
    about = {
        "table": table.name,
        "title": table.title,
        "preset": table.preset,
        "holdout_clean": table.holdout_clean,
        "command": command,
        "detects": table.detects,
        "cases": [{"key": case.key, "name": case.name, "title": case.title, "own": case.own} for case in table.cases],
        "methods": [{"key": variant_key(v, table.flags), "name": v.name} for v in table.variants],
        "seeds": list(table.seeds),
    }
    making = {task.name: task for task in plan.making}
    try:
        (folder / RESULTS).mkdir(parents=True, exist_ok=True)
        write_json(folder / ABOUT, about)
        for cell in plan.cells:
            if (cell.folder / "result.json").exists():
                key = variant_key(cell.variant, table.flags)
                write_json(folder / RESULTS / _file(cell.case.key, key, cell.seed), _result(cell, making))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=folder, hint="choose another --out") from error
    return folder


def _file(case: str, variant: str, seed: int) -> str:
    return f"{case}_{variant}_s{seed}.json"


def _result(cell: Cell, making: Mapping[str, Task]) -> dict[str, Any]:
    """A run's result.json, with the commands that made it."""
    run = load_run(cell.folder, arrays=False)
    assert run.result is not None
    argvs = [*(task.argv for task in _before(cell.task, making)), _as_it_ran(cell.task.argv, run.config)]
    return {**run.result, "commands": [f"dbd {shlex.join(argv)}" for argv in argvs]}


def _as_it_ran(argv: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """A run's command with the threads that it had, which are not always those that a plan has for it today."""
    words, threads = list(argv), (config.get("compute") or {}).get("threads")
    if THREADS in words:
        at = words.index(THREADS)
        words[at : at + 2] = [] if threads is None else [THREADS, str(threads)]
    return words


def _before(task: Task, making: Mapping[str, Task]) -> list[Task]:
    found: list[Task] = []
    for name in task.needs:
        found += [other for other in (*_before(making[name], making), making[name]) if other not in found]
    return found


def read(folder: Path) -> Made:
    """The table and its results from a folder of `write_results`.

    Raises:
        UserError: it is not such a folder.
    """
    try:
        about = read_json(folder / ABOUT)
        rows = []
        for case in about["cases"]:
            for method in about["methods"]:
                paths = [folder / RESULTS / _file(case["key"], method["key"], seed) for seed in about["seeds"]]
                results = tuple(read_json(path) for path in paths if path.exists())
                rows.append(
                    Row(
                        case=case["name"],
                        attack=case["title"],
                        own=case["own"],
                        variant=method["name"],
                        results=results,
                    )
                )
        return Made(about=about, rows=tuple(rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a table's results ({error})", where=folder) from error


def trained_s(results: Iterable[tuple[str, Mapping[str, Any]]]) -> float:
    """Seconds of training with each shared stage once.

    Args:
        results: of runs, each with the case that it is of.
    """
    trained: list[tuple[str, int, str, float]] = []
    found: set[tuple[str, int, str, float]] = set()  # in the store; with the seconds of the run that trained it
    for case, result in results:
        for stage, seconds in (result.get("seconds") or {}).items():
            one = (case, result["seed"], stage, seconds)
            found.add(one) if stage in (result.get("reused_stages") or ()) else trained.append(one)
    return sum(seconds for *_, seconds in [*trained, *(found - set(trained))])


def missing(made: Made) -> Sequence[str]:
    """Cells without a result, as "ATTACK, METHOD (2 of 3)"."""
    seeds = len(made.about["seeds"])
    return [
        f"{row.attack}, {row.method} ({len(row.results)} of {seeds})" for row in made.rows if len(row.results) < seeds
    ]
