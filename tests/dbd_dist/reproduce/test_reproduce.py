"""Whole tables of short runs: made, left alone, resumed after a kill, on Ray."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dbd_dist.cli import main

FLAGS = ("--simclr.batch", "60", "--warmup.batch", "60", "--supervised.batch", "60", "--compute.precision", "fp32",
         "--compute.threads", "1")  # fmt: skip


def table_file(folder: Path, **fields: object) -> Path:
    """A small table in a file: one attack, one seed."""
    path = folder / "small.json"
    content = {
        "title": "Small", "preset": "smoke", "attacks": ["badnets"], "methods": ["none", "dbd"], "seeds": [0],
        "source": ["digits", "--train-per-class", "40", "--test-per-class", "5"], "flags": list(FLAGS),
    }  # fmt: skip
    path.write_text(json.dumps(content | fields))
    return path


def numbers(out: Path) -> list[dict[str, str]]:
    """Rows of the CSV, without what differs from run to run."""
    with (out / "small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    return [
        {key: value for key, value in row.items() if key not in ("seconds_mean", "seconds_std", "commands")}
        for row in rows
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, list[str]]:
    """Where the small table was made, with paths below that folder, and the command. Its runs are not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    argv = ["reproduce", str(table_file(folder)), "--storage", "runs", "--out", "out"]
    with contextlib.chdir(folder):
        assert main(argv) == 0
    return folder, argv


def test_a_small_table_is_made_once(made, monkeypatch, capsys):
    folder, argv = made
    monkeypatch.chdir(folder)
    out = Path("out")
    assert {path.name for path in out.iterdir()} == {
        "table.json", "results", "small.md", "small.tex", "small.csv", "small.html"
    }  # fmt: skip
    rows = numbers(out)
    assert [(row["attack"], row["method"], row["n"]) for row in rows] == [
        ("badnets", "none", "1"),
        ("badnets", "dbd", "1"),
    ]
    assert all(0 <= float(row["clean_acc_mean"]) <= 1 and row["clean_acc_std"] == "" for row in rows)
    results = sorted(Path("runs/reproduce/smoke").glob("*/*/s0/result.json"))
    assert len(results) == 2
    stored = {json.loads(path.read_text())["method"]: json.loads(path.read_text()) for path in results}
    assert float(rows[1]["asr_mean"]) == stored["dbd"]["asr"]
    assert stored["dbd"]["train_size"] == 400 - 20  # 5 % are set aside
    one = json.loads(next((out / "results").glob("badnets_dbd*_s0.json")).read_text())
    assert 0 <= one["split_quality"]["first"]["auroc"] <= 1
    assert one["commands"][0].startswith("dbd prepare digits ")
    assert one["commands"][-1].startswith("dbd train smoke --method dbd --seed 0 --data ")

    before = {path: path.stat().st_mtime_ns for path in results}
    capsys.readouterr()
    assert main(argv) == 0
    assert "2 runs, 2 of them finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results} == before
    assert main([*argv, "--seeds", "0", "1", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "runs to train: 2; about " in shown  # finished runs say how fast this machine is


def test_a_data_set_that_cannot_be_made_ends_the_table_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    """How many images a class has is known only when they are read."""
    monkeypatch.chdir(tmp_path)
    path = table_file(tmp_path, attacks=["badnets", "wanet"], holdout_clean=0.999)
    assert main(["reproduce", str(path), "--storage", "runs", "--out", "out"]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "--holdout-clean: 0.999 of class 0 (0) are 40 of its 40 training images" in line
    assert "left out" not in out + err
    assert not Path("out").exists()
    assert not list(Path("runs").rglob("run.json"))


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # no batch of 500 can be made of 380 images: known only where the data set is there
    broken = {"name": "broken", "method": "none", "flags": ["--supervised.batch", "500"]}
    path = table_file(tmp_path, methods=["none", broken])
    assert main(["reproduce", str(path), "--storage", "runs", "--out", "out"]) == 1
    out, err = capsys.readouterr()
    assert "failed: " in err
    assert "broken" in err
    assert [row["n"] for row in numbers(Path("out"))] == ["1", "0"]
    assert "Without a result: BadNets, broken (0 of 1)" in out


@pytest.mark.slow
def test_the_main_table_with_the_smoke_preset(tmp_path, monkeypatch, capsys):
    """Every method, an artefact that has to be crafted first, and a part of the attacks and seeds."""
    monkeypatch.chdir(tmp_path)
    argv = ["main", "--preset", "smoke", "--attacks", "label-consistent", "--seeds", "0"]
    assert main(["reproduce", *argv, "--storage", "runs", "--out", "out"]) == 0, capsys.readouterr()
    with Path("out/main.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    detectors = {"nc", "spectral", "activation-clustering", "abl"}
    assert rows.keys() == {"none", "dpsgd", "shrinkpad", "nad", "dbd"} | detectors
    assert all((rows[method]["flagged_fpr_mean"] != "") == (method in detectors - {"nc"}) for method in rows)
    assert all(row["n"] == "1" and 0 <= float(row["asr_mean"]) <= 1 for row in rows.values())
    assert float(rows["dpsgd"]["measures_epsilon_mean"]) > 0
    assert rows["nad"]["needs_clean"] == "True"
    assert [word for command in rows["nc"]["commands"].split("; ") for word in command.split()[1:2]] == [
        "prepare", "craft", "prepare", "train"
    ]  # fmt: skip
    assert "Checks of the article's claims: " in capsys.readouterr().out


def start(table: Path, storage: Path, out: Path) -> subprocess.Popen:
    argv = ["reproduce", str(table), "--storage", str(storage), "--out", str(out), "--jobs", "2"]
    log = (storage.parent / f"{storage.name}.log").open("a")
    command = [sys.executable, "-m", "dbd_dist.cli", *argv]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_table(tmp_path, made):
    """SIGKILL of the command while two runs are at work: they end with it, and the same command finishes the table,
    which is that of one run after the other."""
    table = table_file(tmp_path)
    storage, out = tmp_path / "killed", tmp_path / "killed-out"
    process = start(table, storage, out)
    runs = storage / "reproduce" / "smoke"
    deadline = time.monotonic() + 300
    while not list(runs.glob("*/dbd*/s0/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(runs.glob("*/*/s0/result.json"))) < 2
    assert not (out / "small.csv").exists()
    assert start(table, storage, out).wait(timeout=600) == 0, (tmp_path / "killed.log").read_text()
    assert numbers(out) == numbers(made[0] / "out")


@pytest.mark.slow
@pytest.mark.ray
def test_ray_trains_several_at_a_time(tmp_path, monkeypatch, capsys):
    """A Ray of two CPUs of this machine's own has room for two runs of one worker; both say what Ray sets aside."""
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--compute.workers", "1"]
    path = table_file(tmp_path, methods=["none"], seeds=[0, 1], flags=flags)
    argv = ["reproduce", str(path), "--storage", "runs", "--out", "out", "--launcher", "ray", "--jobs", "2"]
    assert main(argv) == 0, capsys.readouterr()
    (row,) = numbers(Path("out"))
    assert row["n"] == "2"
    for result in Path("out/results").glob("*.json"):
        assert "--launcher ray --cpus-per-worker " in json.loads(result.read_text())["commands"][-1]
