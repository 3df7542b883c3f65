"""What Ray adds to a run: once, and for every epoch (its report is a barrier and writes a checkpoint)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from data_prep.errors import UserError
from dbd_dist.bench.row import Row, Setup

SHORT, LONG = 1, 21  # epochs


def measure(setup: Setup) -> Iterator[Row]:
    seconds = {
        (launcher, epochs): _run(setup, launcher, epochs) for launcher in ("local", "ray") for epochs in (SHORT, LONG)
    }
    each = {k: (seconds[k, LONG] - seconds[k, SHORT]) / (LONG - SHORT) for k in ("local", "ray")}
    once = {k: seconds[k, SHORT] - each[k] for k in ("local", "ray")}
    for name, found in (("an epoch, beyond plain Python's", each), ("a run, beyond plain Python's", once)):
        notes = {"ray_s": found["ray"], "local_s": found["local"]}
        yield Row(bench="ray", name=name, unit="s", values=[found["ray"] - found["local"]], notes=notes)


def _run(setup: Setup, launcher: str, epochs: int) -> float:
    """Seconds of a `dbd train` whose epochs are a few steps of a tiny network."""
    batch = min(64, setup.dataset.manifest.counts["train"])
    command = [
        sys.executable, "-m", "dbd_dist.cli", "train", "smoke", "--method", "none", "--launcher", launcher,
        "--data", str(setup.dataset.folder.resolve()), "--storage", str(setup.scratch / "ray"),
        "--name", f"{launcher}{epochs}", "--supervised.epochs", str(epochs), "--supervised.batch", str(batch),
        "--evaluate-every", "0", "--compute.workers", "1", "--compute.device", setup.device.type,
        "--compute.threads", str(setup.threads),
    ]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    start = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, check=False)
    if code.returncode:
        raise UserError(f"dbd train ended with code {code.returncode}", where=" ".join(command))
    return time.perf_counter() - start
