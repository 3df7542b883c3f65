"""MLflow: `pip install 'dbd-dist[mlflow]'`. MLFLOW_TRACKING_URI names the server; MLFLOW_EXPERIMENT_NAME the group."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from dbd_dist.tracking.tracker import RunInfo, Tracker, figures

FOLDER_TAG = "dbd.folder"
LONGEST_VALUE = 500
"""Of a parameter; MLflow refuses longer ones."""


class MLflow(Tracker):
    """A run of the same folder resumes: it is found by a tag."""

    name = "mlflow"
    package = "mlflow"

    def __init__(self, run: RunInfo):
        super().__init__(run)
        self._client: Any = importlib.import_module("mlflow.tracking").MlflowClient()
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "dbd"
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
        escaped = str(run.folder).replace("'", "")
        found = self._client.search_runs([experiment_id], f"tags.`{FOLDER_TAG}` = '{escaped}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(experiment_id, run_name=run.name, tags={FOLDER_TAG: escaped}).info.run_id
        for name, value in _flat(run.config):
            self._client.log_param(self._id, name, str(value)[:LONGEST_VALUE])

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in figures(row).items():
            self._client.log_metric(self._id, name, value, step=row["epoch"])

    def finish(self, result: Mapping[str, Any] | None) -> None:
        for name, value in (result or {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._client.log_metric(self._id, name, value)
        self._client.set_terminated(self._id, status="FINISHED" if result is not None else "KILLED")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
