"""A sweep before it starts: everything that is decided and checked while nothing has been written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.runtime import runner
from dbd_dist.runtime.disk import check_sweep
from dbd_dist.runtime.keys import method_hash
from tune_spaces.attack_settings import check_attack, of_training
from tune_spaces.metrics import Metric
from tune_spaces.space import Choice, Distribution, grid


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al., MLSys 2020, arXiv 1810.05934) over epochs of the last stage."""

    grace: int
    """Epochs before a trial can be stopped."""
    reduction: int = 3
    """Of the trials that reach a rung, one of so many goes on to the next."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a sweep does."""

    space: str
    vary: Mapping[str, Distribution]
    fixed: Mapping[str, Any]
    base: TrainConfig
    """What all trials have in common, `fixed` among it where it is part of a run."""
    datas: Mapping[int, Path]
    """Seed -> data set; for attacks the clean one."""
    search: Literal["grid", "random", "tpe"]
    trials: int
    metrics: tuple[Metric, ...]
    """Several: a Pareto front is sought."""
    truth: bool = True
    asha: Asha | None = None
    attacks: bool = False
    min_psnr: float | None = None
    min_ssim: float | None = None
    against: tuple[str, ...] = ()
    """Methods that the best attack is tried against at the end."""
    first: Mapping[str, Any] | None = None
    """The values of the first trial, where the search is free to choose."""
    workers: int = 1
    gpus_per_worker: float | None = None
    parallel: int | None = None
    time_budget_s: float | None = None
    storage: Path
    name: str

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.datas)

    @property
    def points(self) -> list[dict[str, Any]]:
        """Of a grid: the values of each trial."""
        return grid(self.vary)[: self.trials]

    def identity(self, data_hash: str) -> dict[str, Any]:
        """What a sweep is recognised by: other values are another sweep."""
        return {
            "space": self.space,
            "vary": {field: str(given) for field, given in self.vary.items()},
            "fix": dict(self.fixed),
            "search": self.search,
            "metric": [f"{metric.name} {'max' if metric.up else 'min'}" for metric in self.metrics],
            "truth": "known" if self.truth else "none",
            "seeds": list(self.seeds),
            "early stopping": None if self.asha is None else f"asha {self.asha.grace} {self.asha.reduction}",
            "visibility": [self.min_psnr, self.min_ssim],
            "configuration": method_hash(self.base),
            "data": data_hash,
        }

    def config(self, values: Mapping[str, Any], seed: int | None = None) -> TrainConfig:
        """The configuration of one trial's run.

        Raises:
            UserError: a field does not exist, or a value is not allowed.
        """
        config = override(self.base, of_training(values))
        return config if seed is None else override(config, {"seed": seed, "data": str(self.datas[seed])})


def check(plan: Plan, dataset: Dataset) -> None:
    """What can be refused before anything starts, rather than by a trial minutes later.

    Raises:
        UserError: a field does not exist, a bound is not allowed or does not fit the data or the workers, or there is
            no room for all runs.
    """
    first = {field: given.bounds()[0] for field, given in plan.vary.items()}
    if plan.attacks:
        check_attack(plan.vary, plan.fixed)
    for field, given in plan.vary.items():
        if plan.attacks and field.partition(".")[0] in ("craft", "prepare"):
            continue
        for value in given.bounds():
            _check_one(plan, dataset, field, given, value)
    if plan.search == "grid":
        for point in plan.points:
            runner.check(plan.config(point), dataset, plan.workers)
    if not (plan.folder / "sweep.json").exists():
        runs = plan.trials * len(plan.seeds)
        check_sweep((plan.config(first) for _ in range(runs)), dataset, plan.folder)


def _check_one(plan: Plan, dataset: Dataset, field: str, given: Distribution, value: Any) -> None:
    """One bound of a field, the others as in the base."""
    what = "one of its values" if isinstance(given, Choice) else "a bound of it"
    try:
        runner.check(plan.config({field: value}), dataset, plan.workers)
    except UserError as error:
        if error.where == field and "no such field" in error.what:
            raise
        raise UserError(
            f"{value!r}, {what}, is not allowed: {error.what}",
            where=f"{field}={given}",
            expected=error.expected,
            hint=error.hint,
        ) from error
