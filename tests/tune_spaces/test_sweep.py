"""Sweeps on one shared Ray: stages shared, numbers of separate runs, failures, early stops, signals and kills."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_prep.io.json import read_json
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.launch.local import run_local
from tune_spaces.trial import of_run

pytestmark = [pytest.mark.slow, pytest.mark.ray]

KEEP, ALPHA = (0.4, 0.6), (0.1, 1.0)
FLAGS = (
    "tune", "filter", "--smoke", "--name", "sweep", "--vary", f"split.keep=choice{KEEP}",
    "--vary", f"warmup.sce_alpha=choice{ALPHA}", "--fix", "simclr.epochs=6",
)  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    storage: Path
    said: str

    @property
    def folder(self) -> Path:
        return self.storage / "sweep"


def rows(folder: Path) -> list[dict[str, Any]]:
    """Trials by number, as sweep.json has them."""
    return sorted(json.loads((folder / "sweep.json").read_text())["trials"], key=lambda row: row["number"])


def figures(folder: Path) -> list[Any]:
    """What no disturbance may change."""
    return [(row["number"], row["status"], row["values"], row["metrics"]) for row in rows(folder)]


@pytest.fixture(scope="module")
def undisturbed(ray_here, tmp_path_factory) -> Undisturbed:
    """Four trials, two at a time."""
    storage = tmp_path_factory.mktemp("undisturbed")
    done = run(storage)
    out, _ = done.communicate(timeout=400)
    assert done.returncode == 0, out
    return Undisturbed(storage, out)


def run(storage: Path, *more: str) -> subprocess.Popen[str]:
    """The command in a process of its own, on the shared Ray."""
    import ray

    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dbd_dist", *FLAGS, *more, "--storage", str(storage)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_stages_are_shared_and_the_numbers_are_those_of_separate_runs(undisturbed, tmp_path):
    stages = sorted(path.name.split("-")[0] for path in (undisturbed.storage / "stages").iterdir())
    assert stages == ["simclr", "warmup", "warmup"]
    assert list(undisturbed.storage.glob("stages/*/.lease")) == []
    assert "to train: simclr 1 x, warmup 2 x, mixmatch 4 x" in undisturbed.said
    assert undisturbed.said.count("| best: trial") == 4
    for name in ("sweep.json", "trials.parquet", "sweep.html", "tensorboard"):
        assert (undisturbed.folder / name).exists()

    row = rows(undisturbed.folder)[3]
    assert row["values"] == {"split.keep": 0.6, "warmup.sce_alpha": 1.0}
    recorded = json.loads((Path(row["runs"][0]) / "run.json").read_text())
    assert recorded["command"][1:3] == ["tune", "filter"]
    config = TrainConfig.from_dict(recorded["config"])
    alone = run_local(config, storage=tmp_path, name="alone", quiet=True)  # its own pretraining, in another storage
    assert alone is not None
    assert alone["reused_stages"] == []
    assert of_run(tmp_path / "alone", alone) == row["metrics"]


def test_the_printed_command_retrains_the_winner(undisturbed, capsys):
    (line,) = [line for line in undisturbed.said.splitlines() if line.startswith("retrain the best: ")]
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == ["dbd", "train"]
    assert main([*words[1:], "--launcher", "local"]) == 0
    capsys.readouterr()
    again = json.loads((undisturbed.storage / "sweep-best" / "result.json").read_text())
    best = json.loads((undisturbed.folder / "sweep.json").read_text())["trials"][0]
    assert {name: again[name] for name in ("clean_acc", "asr", "kept_poisoned")} == {
        name: best["metrics"][name] for name in ("clean_acc", "asr", "kept_poisoned")
    }


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], limit_s: float = 200) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_ctrl_c_in_the_shared_stage_and_a_kill_later_change_nothing(undisturbed, tmp_path):
    folder = tmp_path / "sweep"
    first = run(tmp_path)
    wait_for(lambda: "simclr" in _progress(folder), first)
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=240)  # 15 s where the machine is idle
    assert first.returncode == 130, out
    assert "the same command resumes" in out
    assert {row["status"] for row in rows(folder)} == {"running"}
    assert len(rows(folder)) <= 2  # no further trial

    second = run(tmp_path)
    wait_for(lambda: any(row["status"] == "finished" for row in rows(folder)), second)
    second.kill()
    second.communicate()

    last = run(tmp_path)
    out, _ = last.communicate(timeout=400)
    assert last.returncode == 0, out
    assert "finished" in out
    assert figures(folder) == figures(undisturbed.folder)
    assert list(tmp_path.glob("stages/*/.lease")) == []
    import ray

    wait = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0:
        assert time.monotonic() < wait, "a trial still holds CPUs"
        time.sleep(0.5)


def _progress(folder: Path) -> str:
    try:
        return (folder / "trial-0000" / "progress.json").read_text()
    except OSError:
        return ""


def test_a_trial_that_fails_loses_no_other(undisturbed, capsys):
    """On the pretraining of before; a rate of 1e30 diverges."""
    argv = ["tune", "filter", "--smoke", "--name", "failing", "--storage", str(undisturbed.storage)]
    argv += ["--vary", "mixmatch.lr=choice(1e30, 0.002)", "--fix", "split.keep=0.5", "--fix", "simclr.epochs=6"]
    assert main(argv) == 1
    said = capsys.readouterr()
    found = rows(undisturbed.storage / "failing")
    assert [row["status"] for row in found] == ["failed", "finished"]
    assert "not a finite number" in found[0]["message"]
    assert "1 of 2 trials failed" in said.err
    assert "best: trial 1" in said.out


def test_trials_that_fall_behind_are_stopped_early(undisturbed, capsys):
    """All have one pretraining; after so little of it fine-tuning at its usual rate loses what the warm-up had, while a
    rate of nearly 0 keeps it."""
    argv = ["tune", "filter", "--smoke", "--name", "asha", "--storage", str(undisturbed.storage), "--parallel", "1"]
    argv += ["--fix", "split.keep=0.5", "--fix", "simclr.epochs=6", "--fix", "mixmatch.epochs=8"]
    argv += ["--asha", "--grace", "2", "--reduction", "2", "--metric", "clean_acc"]
    assert main([*argv, "--vary", "mixmatch.lr=choice(1e-9, 0.002, 0.0021)"]) == 0
    capsys.readouterr()
    found = rows(undisturbed.storage / "asha")
    stopped = [row for row in found if row["status"] == "stopped"]
    assert stopped
    assert all(2 <= row["epoch"] < 8 for row in stopped)
    assert sum(row["status"] == "finished" for row in found) == len(found) - len(stopped) >= 1
    for row in stopped:
        assert not (Path(row["runs"][0]) / "result.json").exists()


def test_an_attack_is_crafted_trained_on_and_kept(undisturbed, capsys, tmp_path):
    argv = ["tune", "adaptive", "--smoke", "--storage", str(undisturbed.storage), "--name", "attack", "--seeds", "0"]
    argv += ["--search", "tpe", "--trials", "2", "--min-psnr", "15", "--against", "none"]
    argv += ["--vary", "craft.alpha=choice(0.1, 1.0)", "--fix", "craft.separation=0.25", "--fix", "prepare.rate=0.08"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    found = {row["values"]["craft.alpha"]: row for row in rows(undisturbed.storage / "attack")}
    row = found[0.1]
    assert {"asr", "asr_none", "asr_warmup", "first_auroc", "psnr_db", "ssim", "clustering"} <= set(row["metrics"])
    assert row["metrics"]["psnr_db"] >= 15
    assert row["against"]["none"]["asr"] == row["metrics"]["asr_none"]
    if 1.0 in found:  # the whole image replaced: below the bound, not trained on
        assert "asr" not in found[1.0]["metrics"]
        assert "too visible" in said
    for trial in (undisturbed.storage / "attack").glob("trial-*"):
        assert read_json(trial / "artefact" / "artefact.json")["settings"]["separation"] == 0.25
    result = read_json(undisturbed.storage / "attack" / f"trial-{row['number']:04d}" / "dbd" / "result.json")
    assert result["poisoned"] == round(0.08 * result["train_size"])
    artefact = undisturbed.storage / "attack" / "best-artefact"
    assert main(["prepare", "digits", "adaptive", "--artefact", str(artefact), "--datasets", str(tmp_path)]) == 0
