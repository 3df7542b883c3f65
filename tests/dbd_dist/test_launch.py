"""Runs on Ray Train workers end with the numbers of a run without Ray, also where they hung or were stopped. Kills are
in test_soak.py.

One Ray for all of them. Every run goes through the command where the command can do it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import session, topology
from data_prep.io.hashes import sha256_file
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig, override
from dbd_dist.fields import to_dict
from dbd_dist.launch import ray_train as launch
from dbd_dist.launch.local import run_local
from dbd_dist.launch.ray_train import run_ray
from dbd_dist.reporting.tables import format_results
from dbd_dist.runtime import watchdog
from dbd_dist.runtime.run_folder import RAY_FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = "run"
FINE_TUNING = 8
"""Epochs of MixMatch: room for something to be killed in."""
EPOCHS = [("simclr", 1), ("simclr", 2), ("warmup", 1), ("warmup", 2)] + [
    ("mixmatch", epoch + 1) for epoch in range(FINE_TUNING)
]
KILL_AT = ("mixmatch", 3)
WAIT_S = 240.0  # for what must happen, on a slow machine too


@pytest.fixture(scope="module")
def config(smoke_config) -> TrainConfig:
    return override(smoke_config, {"mixmatch.epochs": FINE_TUNING, "compute.workers": 2})


@pytest.fixture(scope="module")
def described(config, tmp_path_factory) -> Path:
    """The configuration as --config takes it."""
    path = tmp_path_factory.mktemp("described") / "run.json"
    path.write_text(json.dumps({"config": to_dict(config)}))
    return path


@pytest.fixture(scope="module")
def one_worker(smoke_config, tmp_path_factory) -> tuple[Path, Path]:
    """A run of one worker, which costs Ray less: its configuration as --config takes it, and the storage of the run
    without Ray, not to be changed. Its epochs are shorter, so there are more of them."""
    config = override(smoke_config, {"mixmatch.epochs": 4 * FINE_TUNING})
    folder = tmp_path_factory.mktemp("one-worker")
    (folder / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    assert run_local(config, storage=folder / "runs", name=RUN, quiet=True)
    return folder / "run.json", folder / "runs"


@pytest.fixture(scope="module")
def undisturbed(described, tmp_path_factory) -> Path:
    """The storage of the run as two ranks of torchrun. Not to be changed."""
    storage = tmp_path_factory.mktemp("undisturbed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = command(described, storage, "--launcher", "local")
    done = subprocess.run([*launcher, "-m", "dbd_dist.cli", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return storage


@pytest.fixture(scope="module")
def on_ray(config, tmp_path_factory, ray_here) -> Path:
    """The storage of the run on two Ray workers, one of which stops in the middle: the other waits for it, is ended by
    its watchdog, and Ray Train starts both again. Not to be changed."""
    storage = tmp_path_factory.mktemp("on-ray")

    def stop_one() -> None:
        first = wait_for(lambda: len(pids := pids_of("RayTrainWorker")) == 2 and pids)[0]
        wait_for(lambda: KILL_AT in epochs(storage))
        os.kill(first, signal.SIGSTOP)

    watched = replace(config, compute=replace(config.compute, stall_s=8.0))
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_one)
        run_ray(watched, storage=storage, name=RUN, quiet=True)
        stopping.result()
    return storage


def command(described: Path, storage: Path, *flags: str) -> list[str]:
    return ["train", "--config", str(described), "--name", RUN, "--storage", str(storage), *flags]


def events(storage: Path, process: str) -> list[dict[str, Any]]:
    """What the log of a rank, or of the driver, says."""
    return [json.loads(line) for line in (storage / RUN / "logs" / f"{process}.jsonl").read_text().splitlines()]


def result_of(storage: Path) -> dict[str, Any]:
    return json.loads((storage / RUN / "result.json").read_text())


def logged(storage: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; of a running run, those that are whole."""
    path = storage / RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def outcome(storage: Path) -> dict[str, Any]:
    """All that equal runs have in common: numbers of the result and of every epoch; weights and split, as hashes."""
    result = {k: v for k, v in result_of(storage).items() if k not in ("seconds", "commit")}
    rows = [{k: v for k, v in row.items() if k not in ("time_s", "images_per_s")} for row in logged(storage)]
    files = [storage / RUN / name for name in ("model.safetensors", "split.parquet")]
    return {"result": result, "rows": rows, **{f.name: sha256_file(f) for f in files}}


def epochs(storage: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["epoch"]) for row in logged(storage)]


def content(folder: Path) -> dict[str, str]:
    """What every file below a folder holds, as hashes."""
    return {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for(condition: Callable[[], Any]) -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {WAIT_S:.0f} s")


def pids_of(actor: str) -> list[int]:
    """Processes of the actors of a class. To be asked for before it is time to end them, since Ray takes its time."""
    from ray.util.state import list_actors

    alive: list[Any] = [*list_actors(filters=[("class_name", "=", actor), ("state", "=", "ALIVE")])]
    return [found.pid for found in alive]


def note_failures(file: Path) -> Any:
    """A callback for Ray Train that writes a line to `file` whenever workers fail."""
    from ray.train import UserCallback

    class Note(UserCallback):  # called in another process, which knows no test modules: local, so that it goes whole
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            with open(file, "a") as lines:
                lines.write(", ".join(f"rank {r}: {type(e).__name__}" for r, e in worker_exceptions.items()) + "\n")

    return Note()


# -- the same numbers as without Ray


def test_two_workers_equal_two_ranks_of_torchrun(undisturbed, on_ray):
    assert epochs(on_ray) == EPOCHS
    assert result_of(on_ray)["world_size"] == 2
    assert outcome(on_ray) == outcome(undisturbed)
    more = {p.name for p in (on_ray / RUN).iterdir()} - {p.name for p in (undisturbed / RUN).iterdir()}
    assert more == {RAY_FOLDER, watchdog.FOLDER}


def test_a_worker_that_hangs_is_replaced(on_ray):
    (stacks,) = watchdog.stacks(on_ray / RUN)
    waits_in = r'File ".*/dbd_dist/(stages|evaluation|distributed|runtime)/'  # wherever the other's stop met it
    assert re.search(waits_in, stacks.read_text())
    (retry,) = (row for row in events(on_ray, "driver") if row["event"] == "retry")
    assert retry["level"] == "warning"
    rank = int(stacks.name[len("rank")])
    seen = [row["event"] for row in events(on_ray, f"rank{rank}")]
    assert seen.count("start") == 2
    assert seen.index("stall") > seen.index("start")
    assert seen[-1] == "finish"


def test_ray_knows_the_run_and_its_newest_checkpoint(on_ray):
    from ray.train import Result

    from dbd_dist.launch.worker import POINTER_FILE

    folder = on_ray / RUN / RAY_FOLDER
    assert [p.name for p in folder.iterdir()] == [RUN]
    result = Result.from_path(str(folder / RUN))
    last = logged(on_ray)[-1]
    assert result.metrics == last
    ((best, metrics),) = result.best_checkpoints
    assert metrics == last
    assert result.checkpoint is not None
    assert best.path == result.checkpoint.path
    pointer = json.loads((Path(best.path) / POINTER_FILE).read_text())
    assert (pointer["stage"], pointer["epoch"]) == EPOCHS[-1]
    newest = max((on_ray / RUN / "checkpoints").iterdir())
    assert pointer["uri"] == newest.resolve().as_uri()
    header, payload = newest.read_bytes().split(b"\n", 2)[1:]
    assert pointer["sha256"] == header.decode() == hashlib.sha256(payload).hexdigest()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 100_000


def test_a_finished_run_is_not_started_again(on_ray, described, monkeypatch, capsys):
    def refuse(**_):
        raise AssertionError("Ray is not needed")

    before = content(on_ray)
    monkeypatch.setattr(session, "connect", refuse)
    assert main(command(described, on_ray)) == 0
    out, message = capsys.readouterr()
    assert "is finished" in message
    assert format_results([result_of(on_ray)]) in out
    assert str((on_ray / RUN).resolve()) in out
    assert content(on_ray) == before


# -- runs that are ended


def test_workers_that_hang_every_time_are_one_message(one_worker, tmp_path, ray_here, monkeypatch, capfd):
    """The limit is too short for anything, the start included."""
    monkeypatch.setattr("dbd_dist.launch.ray_train.RETRIES", 1)
    argv = command(one_worker[0], tmp_path, "--compute.stall-s", "0.1")
    assert main(argv) == watchdog.EXIT_CODE
    message = capfd.readouterr().err
    (line,) = (line for line in message.splitlines() if line.startswith("error: ") and "its workers hung" in line)
    first, second = watchdog.stacks(tmp_path / RUN)
    assert str(second) in line
    assert str(first) not in line
    assert "the same command resumes from the last checkpoint" in line
    assert not (tmp_path / RUN / ".lock").exists()


def test_runs_that_are_stopped_or_lose_their_controller_resume(one_worker, tmp_path, ray_here, capfd):
    described, undisturbed = one_worker
    argv = command(described, tmp_path)
    with open(tmp_path / "output", "w+") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "dbd_dist.cli", *argv],
            env={**os.environ, "RAY_ADDRESS": ray_here},
            stdout=output,
            stderr=output,
        )
        try:
            wait_for(lambda: driver.poll() is not None or KILL_AT in epochs(tmp_path))
            driver.send_signal(signal.SIGTERM)
            ended = driver.wait(WAIT_S)
        finally:
            driver.kill()
    text = (tmp_path / "output").read_text()
    assert ended == 143, text
    assert "stopped after mixmatch, epoch" in text
    assert "Traceback" not in text
    assert {p.name for p in (tmp_path / RUN).iterdir()} == {
        "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "backbone.safetensors", "backbone.json", "logs",
        RAY_FOLDER,
    }  # fmt: skip
    before = logged(tmp_path)

    # resumed, it loses Ray Train's controller; and once more
    earlier = pids_of("TrainController")
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_the_controller, tmp_path, earlier, after=before)
        assert main(argv) == 1
        killing.result()
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("error: "))
    assert "Ray Train's controller was killed (pid " in line
    assert "the same command resumes from about mixmatch, epoch" in line
    assert main(argv) == 0
    assert logged(tmp_path)[: len(before)] == before  # nothing was trained again
    assert outcome(tmp_path) == outcome(undisturbed)


def kill_the_controller(storage: Path, earlier: list[int], after: list[dict[str, Any]]) -> None:
    (controller,) = wait_for(lambda: set(pids_of("TrainController")).difference(earlier))
    wait_for(lambda: len(logged(storage)) > len(after))
    os.kill(controller, signal.SIGKILL)


@pytest.mark.parametrize("stoppable", [True, False])
def test_signals_are_forwarded_only_where_they_are_heeded(tmp_path, monkeypatch, stoppable):
    """Crafting does not poll for requests to stop: there Ctrl-C has to end the command."""
    handlers: list[Any] = []
    monkeypatch.setattr("ray.train.torch.TorchTrainer", lambda *_, **__: SimpleNamespace(fit=None))
    monkeypatch.setattr(launch, "_wait_for", lambda fit, between: handlers.append(signal.getsignal(signal.SIGINT)))
    before = signal.getsignal(signal.SIGINT)
    resources = topology.WorkerResources(workers=1, cpus_per_worker=1, use_gpu=False)
    launch._on_workers(
        print,
        {},
        resources,
        count=1,
        stoppable=stoppable,
        home=tmp_path,
        progress=tmp_path / "progress.json",
        quiet=True,
    )
    assert (handlers[0] is not before) == stoppable
    assert signal.getsignal(signal.SIGINT) is before


# -- mistakes


def test_a_mistake_that_a_worker_finds_is_one_message(one_worker, tmp_path, ray_here, monkeypatch, capfd):
    failures = tmp_path / "failures"
    monkeypatch.setattr("dbd_dist.launch.ray_train.run_ray", partial(run_ray, callbacks=[note_failures(failures)]))
    assert main(command(one_worker[0], tmp_path, "--simclr.lr", "1e30")) == 2
    out, message = capfd.readouterr()
    (line,) = (line for line in message.splitlines() if line.startswith("error: "))
    assert "simclr, epoch 1, step 2 of 4: the loss is not a finite number" in line
    assert "there is no checkpoint before it" in line
    assert "lower simclr.lr" in line
    assert "Traceback" not in out + message
    assert len(failures.read_text().splitlines()) == 1  # Ray Train would try three times more
    assert {p.name for p in (tmp_path / RUN).iterdir()} <= {
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "logs",
        RAY_FOLDER,
    }
