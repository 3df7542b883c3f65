"""Which values a trial gets: from a grid, at random, or from Optuna's tree-structured Parzen estimator.

What is proposed for a number depends on the seed, the number, and the trials that have ended: a sweep that was cut off
continues as if it had not been.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tune_spaces.plan import Plan
from tune_spaces.space import Choice, Distribution, combinations, grid

STARTUP = 8
"""Random trials before the estimator is asked."""
FINITE = 100_000
"""Up to so many combinations, random search repeats none."""


class Search(Protocol):
    """Proposes values, and is told what came of them."""

    def propose(self, number: int) -> dict[str, Any] | None:
        """The values of a trial; None where there are no more."""
        ...

    def begun(self, number: int, values: Mapping[str, Any]) -> None:
        """A trial that an earlier command has proposed, and that has not ended."""
        ...

    def ended(
        self, number: int, values: Mapping[str, Any], signed: Sequence[float] | None, *, early: int | None
    ) -> None:
        """A trial has ended.

        Args:
            signed: its metrics, higher is better; None where it failed.
            early: the epoch that it was stopped in, if it was stopped early.
        """
        ...


def make(plan: Plan) -> Search:
    """The search that a plan asks for."""
    if plan.search == "grid":
        return Grid(plan.points)
    seed = plan.seeds[0]
    return AtRandom(plan.vary, seed) if plan.search == "random" else Tpe(plan.vary, seed, objectives=len(plan.metrics))


class _Told:
    """Does not care what came of it."""

    def begun(self, number: int, values: Mapping[str, Any]) -> None: ...

    def ended(
        self, number: int, values: Mapping[str, Any], signed: Sequence[float] | None, *, early: int | None
    ) -> None: ...


class Grid(_Told):
    """Every point once."""

    def __init__(self, points: Sequence[dict[str, Any]]):
        self._points = points

    def propose(self, number: int) -> dict[str, Any] | None:
        return self._points[number] if number < len(self._points) else None


class AtRandom(_Told):
    """Independent draws; from listed values alone, every combination once: a trial gives the same numbers again."""

    def __init__(self, vary: Mapping[str, Distribution], seed: int):
        self._vary, self._seed = vary, seed
        size = combinations(vary)
        self._points = grid(vary) if size is not None and size <= FINITE else None
        self._order = np.random.default_rng(seed).permutation(len(self._points or ()))

    def propose(self, number: int) -> dict[str, Any] | None:
        if self._points is not None:
            return self._points[self._order[number]] if number < len(self._points) else None
        shares = np.random.default_rng([self._seed, number]).random(len(self._vary))
        return {field: given.at(float(share)) for (field, given), share in zip(self._vary.items(), shares)}


class Tpe:
    """Optuna's TPE (Bergstra et al. 2011; for several objectives Ozaki et al. 2020), with a generator of its own for
    every number, and trials that are under way counted as bad ones (`constant_liar`)."""

    def __init__(self, vary: Mapping[str, Distribution], seed: int, *, objectives: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._vary, self._seed, self._optuna = vary, seed, optuna
        self._study = optuna.create_study(directions=[optuna.study.StudyDirection.MAXIMIZE] * objectives)
        self._distributions = {field: to_optuna(given) for field, given in vary.items()}
        self._trials: dict[int, Any] = {}

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP, constant_liar=True)

    def propose(self, number: int) -> dict[str, Any] | None:
        self._study.sampler = self._sampler(number)
        trial = self._trials[number] = self._study.ask(self._distributions)
        return {field: _decoded(given, trial.params[field]) for field, given in self._vary.items()}

    def begun(self, number: int, values: Mapping[str, Any]) -> None:
        self._study.enqueue_trial(self._encoded(values))
        self._trials[number] = self._study.ask(self._distributions)

    def ended(
        self, number: int, values: Mapping[str, Any], signed: Sequence[float] | None, *, early: int | None
    ) -> None:
        states = self._optuna.trial.TrialState
        if number not in self._trials:
            self.begun(number, values)
        trial = self._trials.pop(number)
        if signed is None:
            self._study.tell(trial, state=states.FAIL)
        elif early is not None:
            trial.report(signed[0], early)
            self._study.tell(trial, state=states.PRUNED)
        else:
            self._study.tell(trial, list(signed))

    def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            field: given.values.index(values[field]) if isinstance(given, Choice) else values[field]
            for field, given in self._vary.items()
        }


def to_optuna(given: Distribution) -> Any:
    """A distribution as Optuna's; of a choice the place of the value, since lists are no category there."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(given, Choice):
        return CategoricalDistribution(tuple(range(len(given.values))))
    if given.whole:
        return IntDistribution(int(given.low), int(given.high), log=given.log)
    return FloatDistribution(float(given.low), float(given.high), log=given.log)


def _decoded(given: Distribution, value: Any) -> Any:
    return given.values[value] if isinstance(given, Choice) else value
