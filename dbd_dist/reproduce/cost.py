"""What the rest of a table will cost on this machine, from the images a second of finished runs."""

from __future__ import annotations

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

    images_per_s: float
    images: float
    """In an epoch."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of runs that are missing."""

    seconds: float
    """Of training, of all stages that are known, one run at a time."""
    unknown: tuple[str, ...]
    """Stages that no finished run measured, as METHOD: STAGE."""


def speeds(runs: Iterable[Run]) -> dict[str, Speed]:
    """Stage -> its speed, from the epochs that the runs trained themselves."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        for row in run.metrics:
            rate, time_s = row.get("images_per_s"), row.get("time_s")
            if not row.get("reused") and isinstance(rate, int | float) and isinstance(time_s, int | float) and rate > 0:
                found.setdefault(row["stage"], []).append((float(rate), float(rate) * float(time_s)))
    return {
        stage: Speed(
            images_per_s=statistics.median(rate for rate, _ in epochs),
            images=statistics.median(images for _, images in epochs),
        )
        for stage, epochs in found.items()
    }


def finished_runs(storage: Path, preset: str) -> list[Run]:
    """Finished runs of a preset: of any table, and those of `dbd train` directly below the storage."""
    found = []
    for path in [*(storage / FOLDER / preset).glob("*/*/*/result.json"), *storage.glob("*/result.json")]:
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
            if speed is None or not isinstance(epochs, int):
                unknown[f"{cell.variant.name}: {stage.name}"] = None
            else:
                seconds += epochs * speed.images / speed.images_per_s
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


def _where(plan: Plan) -> tuple[Path, str]:
    return plan.place.storage, plan.table.preset


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
