"""Where a run's metrics go besides its own folder. A new one: a file here and a line below; or the entry-point group
``dbd_dist.trackers`` of another package."""

from __future__ import annotations

from collections.abc import Sequence

from data_prep.registry import Registry
from dbd_dist.tracking.mlflow import MLflow
from dbd_dist.tracking.tracker import RunInfo, Tracker, Tracking
from dbd_dist.tracking.wandb import Wandb

TRACKERS: Registry[type[Tracker]] = Registry(
    "trackers", {"wandb": Wandb, "mlflow": MLflow}, base=Tracker, needs=("name",)
)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there, before a run starts.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    for name in names:
        TRACKERS.find(name, where="--compute.log").check()


__all__ = ["TRACKERS", "MLflow", "RunInfo", "Tracker", "Tracking", "Wandb", "check_trackers"]
