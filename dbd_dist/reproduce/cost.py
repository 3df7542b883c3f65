"""What the rest of a table will cost on this machine, from the images a second of finished runs."""

from __future__ import annotations

import glob
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from dbd_dist.reporting.runs import Run, load_run
from dbd_dist.reproduce.grid import FOLDER, Cell, Plan


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast a stage ran here, medians over the epochs of finished runs."""

    epoch_s: float
    whole_s: float
    """All its epochs: of a stage without a number of them in its settings."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of runs that are missing."""

    seconds: float
    """Of training, of all stages that are known, one run at a time."""
    unknown: tuple[str, ...]
    """Stages that no finished run measured, as METHOD: STAGE."""


def speeds(runs: Iterable[Run]) -> dict[str, Speed]:
    """Stage -> its speed, from what the runs trained themselves: images a second where the stage counts any, else
    seconds."""
    epochs: dict[str, list[tuple[float, float]]] = {}
    wholes: dict[str, list[float]] = {}
    for run in runs:
        spent: dict[str, float] = {}
        for row in run.metrics:
            rate, time_s = row.get("images_per_s"), row.get("time_s")
            if row.get("reused") or not isinstance(time_s, int | float):
                continue
            spent[row["stage"]] = spent.get(row["stage"], 0.0) + time_s
            if not isinstance(rate, int | float) or rate <= 0:
                rate = 1.0
            epochs.setdefault(row["stage"], []).append((float(rate), float(rate) * time_s))
        for stage, seconds in spent.items():
            wholes.setdefault(stage, []).append(seconds)
    return {
        stage: Speed(
            epoch_s=statistics.median(count for _, count in of) / statistics.median(rate for rate, _ in of),
            whole_s=statistics.median(wholes[stage]),
        )
        for stage, of in epochs.items()
    }


def finished_runs(storage: Path, preset: str, data: str | None = None) -> list[Run]:
    """Finished runs of a preset: those of tables on `data` (`Plan.data`, the images without their attack) if there are
    any, else of any table, and of `dbd train` directly below the storage."""
    below = storage / FOLDER / preset
    found = [] if data is None else _loaded([below.glob(f"{glob.escape(data)}-*/*/*/result.json")], preset)
    return found or _loaded([below.glob("*/*/*/result.json"), storage.glob("*/result.json")], preset)


def _loaded(paths: Iterable[Iterable[Path]], preset: str) -> list[Run]:
    found = []
    for path in itertools.chain.from_iterable(paths):
        try:
            run = load_run(path.parent, arrays=False)
        except UserError:  # not a run of today's, or damaged: others measure as well
            continue
        if run.config.get("preset") == preset:
            found.append(run)
    return found


def cost(cells: Sequence[Cell], known: Mapping[str, Speed]) -> Cost:
    """What the cells will take; stages that are found, or that an earlier one trains, cost nothing."""
    seconds, unknown = 0.0, {}
    for cell in cells:
        for stage in cell.config.method.trained():
            if stage.name not in cell.train:
                continue
            epochs, speed = getattr(stage, "epochs", None), known.get(stage.name)
            if speed is None:
                unknown[f"{cell.variant.name}: {stage.name}"] = None
            else:
                seconds += epochs * speed.epoch_s if isinstance(epochs, int) else speed.whole_s
    return Cost(seconds=seconds, unknown=tuple(unknown))


def describe(plan: Plan) -> list[str]:
    """The plan in lines: what is there, what is missing, and what that costs."""
    from dbd_dist.reporting import wording

    table, cells = plan.table, plan.cells
    missing = [cell for cell in cells if not cell.task.done]
    making = [task for task in plan.tasks if task.argv[0] != "train"]
    lines = [
        f"{table.name}: {table.title}; preset {table.preset}, {len(table.cases)} attacks x {len(table.variants)} "
        f"methods x {wording.seeds(table.seeds)}: {len(cells)} runs, {len(cells) - len(missing)} of them finished"
    ]
    for what, command in (("data sets", "prepare"), ("artefacts", "craft")):
        names = [Path(task.name).name for task in making if task.argv[0] == command]
        if names:
            lines.append(f"{what} to make: {', '.join(names)}")
    if missing:
        lines.append(f"runs to train: {len(missing)}; {_cost(missing, speeds(finished_runs(*_where(plan))))}")
    return lines


def _where(plan: Plan) -> tuple[Path, str, str]:
    return plan.place.storage, plan.table.preset, plan.data


def _cost(missing: Sequence[Cell], known: Mapping[str, Speed]) -> str:
    from dbd_dist.reporting import wording

    total = cost(missing, known)
    if not known:
        return "what that costs here is not known: no run of this preset has finished in this storage"
    rest = f", beside {', '.join(total.unknown)}, which no finished run measured" if total.unknown else ""
    return f"about {wording.duration(total.seconds)} of training, one run at a time{rest}"


def listing(plan: Plan) -> str:
    """Every cell with its state, what it trains and its estimate, aligned."""
    from dbd_dist.reporting import wording

    known = speeds(finished_runs(*_where(plan)))
    lines = [("attack", "method", "seed", "state", "trains", "estimate")]
    for cell in plan.cells:
        one = cost([cell], known)
        estimate = "" if cell.task.done else "unknown" if one.unknown else wording.duration(one.seconds)
        state = "finished" if cell.task.done else "started" if (cell.folder / "run.json").exists() else "missing"
        trains = ", ".join(cell.train)
        lines.append((cell.case.name, cell.variant.name, str(cell.seed), state, trains, estimate))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths)).rstrip() for line in lines)
