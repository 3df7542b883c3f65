"""One trial in this process: runs of each seed, reuse, what the scheduler is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cluster import topology
from dbd_dist.config import override
from dbd_dist.launch.local import run_local
from dbd_dist.runtime.stopping import Stopped
from tune_spaces import trial
from tune_spaces.metrics import Metric
from tune_spaces.sweep import job_of, size_of

FAST = {"simclr.epochs": 1, "warmup.epochs": 1, "mixmatch.epochs": 2, "mixmatch.steps": 2}
TWO_CORES = topology.Topology((topology.Node(host="h", address="a", cpus=2, gpus=0),))


@pytest.fixture
def job(plan):
    fast = dataclasses.replace(plan, base=override(plan.base, FAST))
    fast.folder.mkdir(parents=True)
    return job_of(fast, size_of(fast, TWO_CORES))


@pytest.mark.slow
def test_a_trial_gives_the_numbers_of_a_run_of_its_own(job, plan, digits, tmp_path):
    values = {"split.keep": 0.4, "warmup.sce_alpha": 1.0}
    first = trial.train(0, {"split.keep": 0.6}, job)
    found = trial.train(1, values, job)
    alone = run_local(
        override(plan.base, FAST | values | {"data": str(digits)}),
        storage=tmp_path / "elsewhere",
        name="alone",
        quiet=True,
    )
    assert alone is not None
    for name in ("clean_acc", "asr", "robust_acc", "kept_poisoned"):
        assert found["metrics"][name] == alone[name]
    assert found["metrics"]["score"] == alone["clean_acc"] - alone["asr"]
    assert first["stages"]["simclr"]["reused"] is False
    assert {name: one["reused"] for name, one in found["stages"].items()} == {
        "simclr": True, "warmup": False, "mixmatch": False,
    }  # fmt: skip
    assert "knn_agreement" in found["metrics"]
    recorded = json.loads((plan.folder / "trial-0001" / "run.json").read_text())
    assert recorded["config"]["split"]["keep"] == 0.4
    assert trial.train(1, values, job)["metrics"] == found["metrics"]  # finished: found, not trained


@pytest.mark.slow
def test_several_seeds_have_a_run_each_and_a_mean(job, digits, plan):
    job = {**job, "datas": {"0": str(digits), "1": str(digits)}}
    found = trial.train(0, {}, job)
    each = found["by_seed"]
    assert found["metrics"]["clean_acc"] == (each["0"]["clean_acc"] + each["1"]["clean_acc"]) / 2
    assert found["spread"]["clean_acc"] >= 0
    assert sorted(p.name for p in (plan.folder / "trial-0000").iterdir()) == ["seed-0", "seed-1"]
    assert len(found["runs"]) == 2


def test_no_run_begins_while_the_sweep_stops(job, plan):
    (plan.folder / trial.STOP_FILE).write_text("SIGINT")
    with pytest.raises(Stopped):
        trial.train(0, {}, job)
    assert not (plan.folder / "trial-0000").exists()


def test_what_the_scheduler_is_told():
    metric = Metric("asr", False)
    row = {"stage": "mixmatch", "epoch": 5, "epochs": 20, "asr": 0.25, "clean_acc": 0.5}
    assert trial.ranked_row(row, metric) == {"epoch": 5, "value": -0.25}
    assert trial.ranked_row(row, Metric("score", True)) == {"epoch": 5, "value": 0.25}
    assert trial.ranked_row(row | {"epoch": 20}, metric) is None  # what is finished cannot be stopped
    assert trial.ranked_row({"stage": "simclr", "epoch": 1, "epochs": 2, "loss": 1.0}, metric) is None


def test_what_a_run_that_was_stopped_early_has_left(tmp_path):
    rows = [
        {"stage": "simclr", "epoch": 1, "epochs": 1, "time_s": 4.0, "reused": True},
        {"stage": "mixmatch", "epoch": 1, "epochs": 9, "time_s": 1.0, "clean_acc": 0.5, "asr": 0.1},
        {"stage": "mixmatch", "epoch": 2, "epochs": 9, "time_s": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "mixm')
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.jsonl").write_text(
        '{"event": "waited for a stage", "seconds": 2.5}\n{"event": "start"}\n'
    )
    left = trial.left_by([tmp_path])
    assert left["stages"] == {
        "simclr": {"seconds": 4.0, "reused": True}, "mixmatch": {"seconds": 2.5, "reused": False},
    }  # fmt: skip
    assert left["waited_s"] == 2.5
    epoch, metrics = trial.early([tmp_path], Metric("score", True))
    assert (epoch, metrics["score"]) == (1, 0.4)
