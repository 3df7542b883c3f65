"""All benchmarks by name, run one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from dbd_dist.bench import augmentation, encode, epoch, jpeg, loader, memory, ray_overhead, scaling, split, step
from dbd_dist.bench.row import Row, Setup
from dbd_dist.runtime.machine import commit, host, versions

BENCHMARKS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "loader": loader.measure,
    "jpeg": jpeg.measure,
    "augmentation": augmentation.measure,
    "simclr": step.measure_simclr,
    "mixmatch": step.measure_mixmatch,
    "split": split.measure,
    "encode": encode.measure,
    "epoch": epoch.measure,
    "scaling": scaling.measure,
    "memory": memory.measure,
    "ray": ray_overhead.measure,
}
ON_REQUEST = ("ray",)
"""Run only when named: starts Ray once a repeat and number of workers."""


def run(names: Sequence[str], setup: Setup, show: Callable[[Row], None]) -> list[Row]:
    """The rows of these benchmarks, each handed to `show` as soon as it is there."""
    torch.set_num_threads(setup.threads)
    torch.backends.cudnn.benchmark = True  # as in training
    found = []
    for name in names:
        for row in BENCHMARKS[name](setup):
            show(row)
            found.append(row)
    return found


def describe(setup: Setup, command: Sequence[str]) -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        load = [round(x, 2) for x in os.getloadavg()]
    except OSError:
        load = None
    return {
        "command": list(command),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(setup.device) if setup.device.type == "cuda" else "cpu",
        "precision": setup.precision,
        "threads": setup.threads,
        "repeats": setup.repeats,
        "quick": setup.quick,
        "load_before": load,
        "dataset": setup.dataset.manifest.name if setup.dataset else None,
        "host": host(),
        "versions": versions(),
        "commit": commit(),
    }


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Everything as JSON."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps({**about, "rows": [row.as_json() for row in rows]}, indent=1) + "\n")
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=path, hint="choose another --json") from error
