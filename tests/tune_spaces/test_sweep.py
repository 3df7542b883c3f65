"""`dbd tune sce --smoke` on one Ray, and called once more when it is finished."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import session
from data_prep.dataset.manifest import open_dataset
from data_prep.io import lock
from data_prep.io.hashes import sha256_file
from dbd_dist.cli import main
from dbd_dist.config import override
from dbd_dist.presets import preset
from dbd_dist.runtime.disk import of_run
from tune_spaces.spaces import SPACES, space

GRID = {"split.keep": (0.5,), "warmup.sce_alpha": (0.1, 1.0), "warmup.sce_beta": (1.0,)}
"""A quarter of what `dbd tune sce --smoke` runs: every trial takes its seconds."""


class Fixed:
    """A preset of one configuration."""

    def __init__(self, preset, config):
        self.prepare, self.compute, self._config = preset.prepare, preset.compute, config

    def config(self, method: str = "dbd"):
        return self._config


def content(*folders: Path) -> dict[Path, str]:
    """What every file below the folders holds, as hashes."""
    return {p: sha256_file(p) for f in folders for p in f.rglob("*") if p.is_file()}


def trained(folder: Path) -> dict[str, str]:
    """What training again would change in a run folder: its rows hold times."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.name in ("run.json", "metrics.jsonl", "result.json")}


def rows_of(output: str) -> list[str]:
    """The lines of the table, which end with how many poisoned images were kept."""
    return [line for line in output.splitlines() if line.endswith(" of 72")]


@pytest.mark.slow
@pytest.mark.ray
def test_a_sweep_pretrains_once_and_its_name_finds_it_again(tmp_path, ray_here, monkeypatch, capsys):
    monkeypatch.setitem(SPACES._parts(), "sce", replace(SPACES["sce"], smoke=GRID))
    storage = tmp_path / "runs"
    sweep = storage / "sweep"
    argv = ["tune", "sce", "--smoke", "--storage", str(storage), "--name", "sweep"]
    assert main(argv) == 0
    table = capsys.readouterr().out
    check(sweep)
    assert json.loads((sweep / "grid.json").read_text()) == json.loads((sweep / "sweep.json").read_text())["space"]
    stages = [path.name.split("-")[0] for path in (storage / "stages").iterdir()]
    assert sorted(stages) == ["simclr", "warmup", "warmup"]  # a warm-up for each alpha
    assert str(sweep) in table
    assert len(rows_of(table)) == 2

    # called again: the same rows, and nothing is trained
    folders = sorted(sweep.glob("trial-*"))
    before = [trained(folder) for folder in (*folders, sweep / "simclr")]
    assert main(argv) == 0
    assert rows_of(capsys.readouterr().out) == rows_of(table)
    assert [trained(folder) for folder in (*folders, sweep / "simclr")] == before
    assert sorted(sweep.glob("trial-*")) == folders


def check(sweep: Path) -> None:
    """sweep.json holds every point once, best first, as the trials' own results say it."""
    written = json.loads((sweep / "sweep.json").read_text())
    assert written["space"] == {field: list(values) for field, values in GRID.items()}
    trials = written["trials"]
    points = [tuple(trial[field] for field in GRID) for trial in trials]
    assert sorted(points) == sorted(itertools.product(*GRID.values()))
    assert [t["score"] for t in trials] == sorted((t["score"] for t in trials), reverse=True)
    assert len({t["folder"] for t in trials}) == len(trials)
    for trial in trials:
        folder = Path(trial["folder"])
        assert folder.parent == sweep
        result = json.loads((folder / "result.json").read_text())
        assert trial["score"] == result["clean_acc"] - result["asr"]
        for field in ("clean_acc", "asr", "kept_poisoned", "poisoned", "reused_stages"):
            assert trial[field] == result[field]
        assert "simclr" in result["reused_stages"]
        config = json.loads((folder / "run.json").read_text())["config"]
        for field in GRID:
            stage, name = field.split(".")
            assert config[stage][name] == trial[field]


# -- what is refused before anything starts


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


def test_a_point_that_does_not_fit_the_data(refused, digits, smoke_config, monkeypatch):
    wide = override(smoke_config, {"mixmatch.batch": 64})
    smoke = preset("smoke")
    monkeypatch.setattr("tune_spaces.cli.find_preset", lambda name: Fixed(smoke, wide))
    message = refused("filter", "--smoke", "--data", str(digits))
    assert "mixmatch.batch" in message
    assert "at most 48" in message  # at split.keep = 0.2, the first point


def test_another_space_in_the_same_folder(refused, digits, smoke_config, monkeypatch, tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    grid = {field: list(values) for field, values in space("sce", smoke=True).grid.items()}
    (folder / "grid.json").write_text(json.dumps(grid))
    smoke = preset("smoke")
    monkeypatch.setattr("tune_spaces.cli.find_preset", lambda name: Fixed(smoke, smoke_config))
    message = refused("filter", "--smoke", "--data", str(digits), "--name", "mine")
    assert "another grid" in message
    assert str(folder) in message


def test_a_sweep_that_another_command_runs(refused, digits, smoke_config, monkeypatch, tmp_path):
    smoke = preset("smoke")
    monkeypatch.setattr("tune_spaces.cli.find_preset", lambda name: Fixed(smoke, smoke_config))
    folder = tmp_path / "runs" / "mine"
    with lock.held(folder / lock.FILE, str(folder)):
        message = refused("sce", "--smoke", "--data", str(digits), "--name", "mine")
    assert f"{folder}: another process is at work on it" in message
    assert f"process {os.getpid()} on " in message


def test_no_room_for_all_trials(refused, digits, smoke_config, monkeypatch):
    smoke = preset("smoke")
    monkeypatch.setattr("tune_spaces.cli.find_preset", lambda name: Fixed(smoke, smoke_config))
    one = of_run(smoke_config, open_dataset(digits)).total
    monkeypatch.setattr("dbd_dist.runtime.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=7 * one))
    message = refused("sce", "--smoke", "--data", str(digits), "--name", "mine")  # eight trials
    assert "the sweep mine needs up to" in message
