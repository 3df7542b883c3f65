"""`dbd tune` as it is typed: what is refused before Ray starts, and what a plan is made of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import session, topology
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.hashes import sha256_file
from dbd_dist.cli import main
from dbd_dist.config import override
from dbd_dist.presets import preset
from dbd_dist.runtime.disk import of_run
from tune_spaces import command
from tune_spaces.flags import seconds
from tune_spaces.sweep import size_of


class Fixed:
    """A preset of one configuration."""

    def __init__(self, config):
        smoke = preset("smoke")
        self.prepare, self.compute, self._config = smoke.prepare, smoke.compute, config

    def config(self, method: str = "dbd"):
        return self._config


def content(folder: Path) -> dict[Path, str]:
    """What every file below a folder holds, as hashes."""
    return {p: sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def small(monkeypatch, smoke_config):
    """Every preset is the tests' small one."""

    def use(config=None):
        monkeypatch.setattr(command, "find_preset", lambda name: Fixed(config or smoke_config))

    use()
    return use


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs `dbd tune` with flags that must be refused without Ray, and with nothing written; gives the message."""

    def run(*flags: str) -> str:
        monkeypatch.setattr(session, "connect", lambda **_: pytest.fail("Ray is not needed"))
        before = content(tmp_path)
        assert main(["tune", *flags, "--storage", str(tmp_path / "runs")]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert content(tmp_path) == before
        return message

    return run


@pytest.mark.parametrize("name", ["", "../elsewhere", "stages"])
def test_names_that_are_empty_or_leave_the_storage(refused, name):
    assert f"--name: {name!r}" in refused("sce", "--smoke", "--name", name)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("sce", "--vary", "split.kep=uniform(0.2,0.8)"), "split.kep: there is no such field"),
        (("sce", "--vary", "split.kep=uniform(0.2,0.8)"), "did you mean split.keep?"),
        (("sce", "--fix", "splitkeep=0.2"), "did you mean split.keep?"),
        (("sce", "--fix", "split.keep=much"), "split.keep"),
        (("sce", "--fix", "split.keep=1.5"), "split.keep: 1.5 is not allowed"),
        (("sce", "--vary", "split.keep=normal(0,1)"), "normal is not known"),
        (("sce", "--vary", "split.keep"), "is not FIELD=VALUE"),
        (("sce", "--metric", "accuracy"), "no trial reports 'accuracy'"),
        (("sce", "--truth", "none", "--metric", "asr"), "asr needs the truth"),
        (("sce", "--time-budget", "soon"), "--time-budget"),
        (("sce", "--trials", "0"), "--trials"),
        (("sce", "--seeds", "1", "1"), "--seeds"),
        (("sce", "--gpus-per-worker", "1.5"), "--gpus-per-worker"),
        (("sce", "--asha", "--metric", "clean_acc", "asr"), "--asha"),
        (("sce", "--asha", "--reduction", "1"), "--reduction"),
        (("sce", "--method", "dbdd"), "--method"),
        (("adaptive", "--asha"), "--asha"),
        (("adaptive", "--truth", "none"), "--truth none"),
        (("adaptive", "--workers", "2"), "--workers"),
        (("adaptive", "--vary", "craft.stepps=int(1,2)"), "did you mean craft.steps?"),
        (("adaptive", "--vary", "prepare.rate=uniform(0.5,2)"), "prepare.rate: 2 is not allowed"),
        (("adaptive", "--vary", "craft.mask_budget=uniform(0.5,2)"), "craft.mask_budget"),
        (("adaptive", "--against", "nothing"), "--against"),
        (("file:nowhere.py",), "no such file"),
        (("sce+nothing",), "nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_data_is_prepared(refused, flags, expected):
    assert expected in refused(*flags, "--smoke")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--vary", "split.keep=uniform(0.2,1.5)"), "1.5, a bound of it, is not allowed"),
        (("--vary", "mixmatch.batch=choice(16,999)"), "999, one of its values, is not allowed"),
        (("--vary", "mixmatch.batch=choice(16,15)", "--workers", "2"), "15, one of its values"),
        (("--vary", "split.keep=choice('half')"), "'half'"),
        (("--workers", "64"), "64 workers"),
    ],
)
def test_bounds_that_the_configuration_the_data_or_the_machine_do_not_allow(refused, small, digits, flags, expected):
    assert expected in refused("filter", "--smoke", "--data", str(digits), *flags)


def test_a_point_that_does_not_fit_the_data(refused, digits, smoke_config, small):
    small(override(smoke_config, {"mixmatch.batch": 64}))
    message = refused("filter", "--smoke", "--data", str(digits))
    assert "mixmatch.batch" in message or "split.keep" in message
    assert "at most 48" in message  # at split.keep = 0.2, the first point


def test_another_space_in_the_same_folder(refused, digits, small, tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text('{"sweep": {"space": "sce"}, "trials": []}')
    message = refused("filter", "--smoke", "--data", str(digits), "--name", "mine")
    assert "another space: 'sce'" in message
    assert str(folder) in message


def test_a_sweep_that_another_command_runs(refused, digits, small, tmp_path):
    folder = tmp_path / "runs" / "mine"
    with lock.held(folder / lock.FILE, str(folder)):
        message = refused("sce", "--smoke", "--data", str(digits), "--name", "mine")
    assert f"{folder}: another process is at work on it" in message
    assert f"process {os.getpid()} on " in message


def test_no_room_for_all_trials(refused, digits, smoke_config, small, monkeypatch):
    one = of_run(smoke_config, open_dataset(digits)).total
    monkeypatch.setattr("dbd_dist.runtime.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=7 * one))
    message = refused("sce", "--smoke", "--data", str(digits), "--name", "mine")  # eight trials
    assert "the sweep mine needs up to" in message


def test_a_budget_of_time():
    assert [seconds(text) for text in ("90", "90s", "1.5m", "2h", "1d")] == [90, 90, 90, 7200, 86400]
    for text in ("", "0", "1w", "-1", "h"):
        with pytest.raises(UserError):
            seconds(text)


def test_help_answers_without_torch():
    """It takes seconds to import, and help needs none of it."""
    lines = ["import sys, tune_spaces.cli as cli", "try: cli.main(['--help'])", "except SystemExit: pass"]
    code = "\n".join([*lines, "assert 'torch' not in sys.modules"])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the filter: the fraction that is kept" in done.stdout.replace("\n", " ").replace("  ", " ")
    assert time.monotonic() - began < 60


# -- how machines are shared


def machine(cpus: int, gpus: int = 0) -> topology.Topology:
    return topology.Topology((topology.Node(host="h", address="a", cpus=cpus, gpus=gpus),))


@pytest.mark.parametrize(
    ("cpus", "change", "parallel", "threads"),
    [
        (2, {}, 2, 1),
        (8, {"trials": 3}, 3, 2),
        (8, {"parallel": 1}, 1, 8),
        (8, {"parallel": 100, "trials": 100}, 8, 1),
        (8, {"workers": 2, "trials": 100}, 4, 1),
        (3, {"workers": 2}, 1, 1),
    ],
)
def test_trials_share_the_cores(plan, cpus, change, parallel, threads):
    size = size_of(replace(plan, **change), machine(cpus))
    assert (size.parallel, size.threads) == (parallel, threads)
    used = sum(size.resources(change.get("workers", 1)).values()) + (size.cpus * change.get("workers", 0))
    assert used * size.parallel <= cpus


def test_a_cluster_that_holds_no_trial(plan):
    with pytest.raises(UserError, match="3 workers"):
        size_of(replace(plan, workers=3), machine(2))
    with pytest.raises(UserError, match="GPU"):
        size_of(replace(plan, gpus_per_worker=1.0), machine(2))
