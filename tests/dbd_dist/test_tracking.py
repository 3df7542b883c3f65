"""Where metrics go besides the run folder: a tracker of our own, the two that are shipped, Ray's gauges, traces."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from cluster.gauges import GAUGES
from data_prep.errors import UserError
from dbd_dist.cli import main
from dbd_dist.config import override
from dbd_dist.launch.local import run_local
from dbd_dist.tracking import TRACKERS, RunInfo, Tracker, Tracking, check_trackers
from dbd_dist.tracking.tracker import figures

ROW = {"stage": "mixmatch", "epoch": 2, "epochs": 8, "loss": 0.5, "clean_acc": 0.9, "reused": True, "note": "x"}


class Memory(Tracker):
    """Keeps what it is given."""

    name = "memory"
    made: ClassVar[list[Memory]] = []

    def __init__(self, run: RunInfo):
        super().__init__(run)
        self.rows: list[Mapping[str, Any]] = []
        self.result: Mapping[str, Any] | None = None
        Memory.made.append(self)

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self.result = result


class Broken(Tracker):
    name = "broken"

    def log(self, row: Mapping[str, Any]) -> None:
        raise ConnectionError("no route to the server")


@pytest.fixture
def plugins(monkeypatch):
    parts = TRACKERS._parts()
    monkeypatch.setitem(parts, "memory", Memory)
    monkeypatch.setitem(parts, "broken", Broken)
    Memory.made.clear()


def test_a_run_tells_its_trackers_every_epoch_and_leaves_a_trace(plugins, smoke_none, tmp_path, caplog):
    config = override(smoke_none, {"compute.profile": 2})
    config = replace(config, compute=replace(config.compute, log=("broken", "memory")))
    run_local(config, storage=tmp_path, name="run", quiet=True)
    (kept,) = Memory.made
    folder = tmp_path / "run"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "checkpoint_s"} for row in kept.rows] == logged
    assert kept.rows[-1]["checkpoint_s"] > 0
    assert kept.run.name == "run"
    assert kept.run.config["method"] == "none"
    assert kept.result == json.loads((folder / "result.json").read_text())
    assert "no longer go to broken: ConnectionError: no route to the server" in caplog.text

    trace = json.loads((folder / "profile" / "supervised.json").read_text())  # as Perfetto reads it
    names = {event.get("name", "") for event in trace["traceEvents"]}
    assert "ProfilerStep#3" in names
    assert any(name.startswith("aten::") for name in names)


def test_figures_are_numbers_under_their_stage():
    assert figures(ROW) == {"mixmatch/loss": 0.5, "mixmatch/clean_acc": 0.9}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--log", "wandbb"], "did you mean 'wandb'"),
        (["--log=comet"], "Expected: wandb, mlflow"),
        (["--compute.profile", "0"], "compute.profile: 0 is not allowed"),
        (["--wait-s", "-1"], "compute.wait_s: -1"),
        (["--compute.labels", "zone"], "Expected: NAME=VALUE"),
        (["--compute.gpus-per-worker", "1.5"], "a whole number, or a part of 1"),
        (["--compute.gpus-per-worker", "0.5", "--compute.workers", "2"], "cannot train together"),
    ],
)
def test_mistakes_are_one_message(argv, words, tmp_path, capsys):
    assert main(["train", "smoke", "--storage", str(tmp_path), *argv]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_missing(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"pip install 'dbd-dist\[{name}\]'"):
        check_trackers([name])


def info(tmp_path) -> RunInfo:
    return RunInfo(name="run", folder=tmp_path / "run", config={"simclr": {"epochs": 2}, "seed": 0})


def test_wandb_is_given_the_run(monkeypatch, tmp_path):
    """Against a stand-in with wandb's calls; it is not installed for tests."""
    calls: list[tuple[str, Any]] = []
    run = types.SimpleNamespace(
        log=lambda values: calls.append(("log", values)),
        summary=types.SimpleNamespace(update=lambda values: calls.append(("summary", values))),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(("init", options)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracking = Tracking([TRACKERS["wandb"]], info(tmp_path))
    tracking.log(ROW)
    tracking.finish({"clean_acc": 0.9, "method": "dbd"})
    (_, options), *rest = calls
    assert options["name"] == "run"
    assert options["resume"] == "allow"
    again = Tracking([TRACKERS["wandb"]], info(tmp_path))
    assert calls[-1][1]["id"] == options["id"]  # the same run resumes
    again.finish(None)
    assert rest == [
        ("log", {"mixmatch/loss": 0.5, "mixmatch/clean_acc": 0.9, "mixmatch/epoch": 2}),
        ("summary", {"clean_acc": 0.9}),
        ("finish", 0),
    ]
    assert calls[-1] == ("finish", 1)


def test_mlflow_keeps_the_run(monkeypatch, tmp_path):
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    from mlflow.tracking import MlflowClient

    for _ in range(2):  # the second resumes the first
        tracking = Tracking([TRACKERS["mlflow"]], info(tmp_path))
        tracking.log(ROW)
        tracking.finish({"clean_acc": 0.9})
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dbd").experiment_id])  # type: ignore[union-attr]
    assert run.data.metrics["mixmatch/loss"] == 0.5
    assert run.data.params["simclr.epochs"] == "2"
    assert run.info.status == "FINISHED"


def test_gauges_are_set_from_a_row(monkeypatch):
    from cluster.gauges import Gauges

    found: dict[str, list[Any]] = {}

    class Gauge:
        def __init__(self, name: str, text: str, tag_keys: tuple[str, ...]):
            self.values = found.setdefault(name, [])

        def set(self, value: float, tags: dict[str, str]) -> None:
            self.values.append((value, tags))

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    Gauges("run").set(ROW | {"asr": None})
    assert found.keys() == {f"dbd_{field}" for field in GAUGES}
    assert found["dbd_loss"] == [(0.5, {"run": "run", "stage": "mixmatch"})]
    assert found["dbd_epoch"] == [(2.0, {"run": "run", "stage": "mixmatch"})]
    assert found["dbd_asr"] == []
