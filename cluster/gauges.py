"""Figures of a run as Ray's own metrics, which Prometheus scrapes and Grafana shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GAUGES = {
    "images_per_s": "Training images a second, all workers together",
    "loss": "Training loss, mean of the last epoch",
    "clean_acc": "Accuracy on clean test images (0-1)",
    "asr": "Attack success rate on triggered test images (0-1)",
    "kept_poisoned": "Poisoned images in the part of the split that keeps its labels; needs the ground truth",
    "checkpoint_s": "Seconds that the last checkpoint took to write",
    "epoch": "Epoch of the stage, from 1",
}
"""Field of a row of metrics.jsonl -> description; the gauge is called dbd_FIELD."""
TAGS = ("run", "stage")


class Gauges:
    """Sets the gauges of one run. In a Ray worker; where Ray exports no metrics, they go nowhere."""

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        self._run = run
        self._gauges = {field: Gauge(f"dbd_{field}", text, tag_keys=TAGS) for field, text in GAUGES.items()}

    def set(self, row: Mapping[str, Any]) -> None:
        """Set those that a row of metrics.jsonl has."""
        for field, gauge in self._gauges.items():
            value = row.get(field)
            if isinstance(value, int | float):
                gauge.set(float(value), tags={"run": self._run, "stage": str(row["stage"])})
