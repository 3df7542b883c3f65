"""The interface of a tracker, and several of them as one."""

from __future__ import annotations

import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a tracker is told of a run at its start."""

    name: str
    """Of the run, which resumes under it."""
    folder: Path
    config: Mapping[str, Any]
    """Plain JSON values (`TrainConfig.to_dict`)."""


class Tracker(ABC):
    """Hands the metrics of a run to a service or a file. Made and called in rank 0 alone, once an epoch.

    Whatever it raises ends it with a warning in the run's log, and not the run.
    """

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    """What it imports, which need not be installed."""

    def __init__(self, run: RunInfo):
        self.run = run

    @classmethod
    def check(cls) -> None:
        """Refuse a tracker whose package is missing.

        Raises:
            UserError
        """
        if cls.package is not None and importlib.util.find_spec(cls.package) is None:
            raise UserError(
                f"{cls.package} is not installed",
                where=f"--compute.log {cls.name}",
                hint=f"pip install 'dbd-dist[{cls.name}]', or leave {cls.name} out",
            )

    @abstractmethod
    def log(self, row: Mapping[str, Any]) -> None:
        """An epoch is over.

        Args:
            row: as in metrics.jsonl: "stage", "epoch", "epochs", "loss" and other figures; "checkpoint_s", the seconds
                that the last checkpoint took to write, where there is one.
        """

    def finish(self, result: Mapping[str, Any] | None) -> None:  # noqa: B027, need not be there
        """The run has ended; `result` as in result.json, None where it stopped or failed before there was one."""


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under STAGE/NAME, as in the event files of TensorBoard."""
    places = ("epoch", "epochs", "reused")
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"{row['stage']}/{name}": float(value) for name, value in numbers.items() if name not in places}


class Tracking:
    """Several trackers as one. One that raises is left out from then on.

    Args:
        kinds: to be made for this run, first.
        made: others, that are there already.
    """

    def __init__(self, kinds: Sequence[type[Tracker]], run: RunInfo, made: Sequence[Tracker] = ()):
        self._active: list[Tracker] = list(made)
        for kind in kinds:
            try:
                self._active.append(kind(run))
            except Exception as error:  # somebody else's service: the run goes on without it
                log.warning("metrics do not go to %s: %s: %s", kind.name, type(error).__name__, error)

    def log(self, row: Mapping[str, Any]) -> None:
        self._each("log", row)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self._each("finish", result)
        self._active = []

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self._active):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                self._active.remove(tracker)
                log.warning("metrics no longer go to %s: %s: %s", tracker.name, type(error).__name__, error)
