"""Seconds from submitting a job to its first training step, on a Ray of this machine, beside Ray's own part.

    python -m tests.benchmarks.submission [--repeats 3] [--json docs/results/submission.json]

Ray's part is a job whose TorchTrainer does nothing, on as many workers, to the first line of their function. Each kind
is submitted once before anything is measured (file caches, the package, the data set), then in turns. The project's own
part is the difference of medians. Goals for 2 cores: 40 s, and 8 s for the own part.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from cluster.jobs import EXCLUDES
from dbd_dist.runtime.machine import versions
from dbd_dist.runtime.run_folder import RAY_FOLDER, STARTED_FILE
from tests.benchmarks.record import record
from tests.soak import Processes

ROOT = Path(__file__).resolve().parents[2]
GCS_PORT, DASHBOARD_PORT = 26379, 28265
ADDRESS = f"http://127.0.0.1:{DASHBOARD_PORT}"
GOAL_S, GOAL_OWN_S = 40.0, 8.0
WAIT_S = 300.0
NOT_OURS = ("RAY_ADDRESS", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
"""Variables that would lead elsewhere, or have Python compile every module in every process."""
EMPTY = """
import sys, time
from pathlib import Path
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer

def loop(config):
    if get_context().get_world_rank() == 0:
        Path(config["out"]).write_text(str(time.time()))

out = Path(sys.argv[1])
TorchTrainer(
    loop,
    train_loop_config={"out": str(out)},
    scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
    run_config=RunConfig(storage_path=str(out.parent / "ray"), name=out.name),
    torch_config=TorchConfig(backend="gloo"),
).fit()
"""


@contextmanager
def ray(temporary: Path) -> Iterator[dict[str, str]]:
    """A head node with a dashboard; yields the environment that commands need."""
    own = {"RAY_TMPDIR": str(temporary), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    compiled = {"PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(temporary / "compiled"))}
    environ = {**kept, **own, **compiled, "PATH": path, "RAY_worker_niceness": "0"}
    words = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={GCS_PORT}"]
    words += ["--dashboard-host=127.0.0.1", f"--dashboard-port={DASHBOARD_PORT}", "--include-dashboard=true"]
    processes = Processes(temporary)
    with open(temporary / "head.log", "w") as log:
        head = subprocess.Popen(words, env=environ, stdout=log, stderr=log, start_new_session=True)
    processes.add(head.pid)
    try:
        until(lambda: _answers(environ))
        yield environ
    finally:
        while list(processes.alive()):
            processes.end()
            head.poll()
            time.sleep(0.5)


def _answers(environ: dict[str, str]) -> bool:
    words = ["ray", "job", "list", "--address", ADDRESS]
    return subprocess.run(words, env=environ, capture_output=True).returncode == 0


def until(holds: Callable[[], Any], every_s: float = 0.02) -> Any:
    """The first true value.

    Raises:
        SystemExit: there is none in time.
    """
    end = time.monotonic() + WAIT_S
    while not (value := holds()):
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(every_s)
    return value


def step_of(folder: Path) -> bool:
    """Whether a run has made a step."""
    try:
        return "step" in json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return False


class Kinds:
    """How each kind is submitted; `measure` gives the seconds to what it waits for, and to what comes before."""

    def __init__(self, environ: dict[str, str], work: Path):
        self._environ, self._work, self._number = environ, work, 0
        (work / "empty").mkdir(parents=True)
        (work / "empty" / "empty.py").write_text(EMPTY)

    def measure(self, kind: str) -> dict[str, float]:
        self._number += 1
        name = f"run{self._number}"
        folder = self._work / "runs" / name
        train = ["train", "smoke", "--storage", str(self._work / "runs"), "--name", name]
        by_ray = ["ray", "job", "submit", "--address", ADDRESS, "--working-dir"]
        excludes = ["--runtime-env-json", json.dumps({"excludes": list(EXCLUDES)})]
        words = {
            "empty": [*by_ray, str(self._work / "empty"), "--", "python", "empty.py", str(self._work / name)],
            "ray job submit": [*by_ray, str(ROOT), *excludes, "--", "python", "-m", "dbd_dist", *train],
            "dbd submit": ["python", "-m", "dbd_dist", "submit", "--address", ADDRESS, "--", *train],
        }[kind]
        marks: dict[str, Callable[[], bool]] = {
            "workers": (folder / RAY_FOLDER / name / STARTED_FILE).exists,
            "first step": lambda: step_of(folder),
        }
        marks = {"first step": (self._work / name).exists} if kind == "empty" else marks
        begun, found = time.monotonic(), dict[str, float]()
        log = self._work / f"{name}.log"
        with open(log, "w") as output:
            process = subprocess.Popen(words, cwd=ROOT, env=self._environ, stdout=output, stderr=output)
        for mark, holds in marks.items():
            until(lambda holds=holds: holds() or process.poll() is not None)
            found[mark] = round(time.monotonic() - begun, 2)
        if process.wait(WAIT_S) != 0 or (kind != "empty" and not (folder / "result.json").exists()):
            raise SystemExit(f"{kind} fails: {log.read_text()[-3000:]}")
        print(f"{kind}: {found}", flush=True)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    load, kinds = os.getloadavg(), ("empty", "ray job submit", "dbd submit")
    temporary = Path(tempfile.mkdtemp(prefix="sub"))
    try:
        with ray(temporary) as environ:
            there = Kinds(environ, temporary / "work")
            for kind in kinds:
                there.measure(kind)
            measured = [{kind: there.measure(kind) for kind in kinds} for _ in range(arguments.repeats)]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows = [_row(kind, [turn[kind] for turn in measured]) for kind in kinds]
    floor = rows[0]["median"]
    for row in rows[1:]:
        row["own part"] = round(row["median"] - floor, 2)
        reached = row["median"] <= GOAL_S and row["own part"] <= GOAL_OWN_S
        print(f"{row['name']}: {row['median']} s, own part {row['own part']} s: {'reached' if reached else 'missed'}")
    record(
        arguments.json, rows, command="python -m tests.benchmarks.submission", note="bytecode and data set cached",
        versions=versions(), load_before=load, goals={"median": GOAL_S, "own part": GOAL_OWN_S},
    )  # fmt: skip
    return 0


def _row(kind: str, turns: list[dict[str, float]]) -> dict[str, Any]:
    times = {mark: [turn[mark] for turn in turns] for mark in turns[0]}
    first = times["first step"]
    row = {"name": kind, "unit": "s", "median": median(first), "least": min(first), "most": max(first), "n": len(first)}
    return row | ({"median to workers": median(times["workers"])} if "workers" in times else {})


if __name__ == "__main__":
    sys.exit(main())
