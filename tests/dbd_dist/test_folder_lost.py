"""A run whose folder goes away in the middle: it tries again, and writes nothing into what is found in its place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.launch.local import run_local
from dbd_dist.runtime import checkpoint
from dbd_dist.runtime.reporter import Reporter
from dbd_dist.runtime.run_folder import RunFolder

GONE = "the run's folder is gone, or another is in its place"


@pytest.fixture
def train(smoke_none, tmp_path, monkeypatch):
    """Gives a function that trains, and calls another one once the first epoch is over."""
    monkeypatch.setattr(checkpoint, "FIRST_WAIT_S", 0.02)
    report = Reporter.report

    def run(happens: Callable[[], object], *, patience_s: float = 0.2):
        def reported(self, end) -> None:
            report(self, end)
            if end.epoch == 1:
                self._checkpoints.flush()
                happens()

        monkeypatch.setattr(Reporter, "report", reported)
        compute = replace(smoke_none.compute, patience_s=patience_s)
        return run_local(replace(smoke_none, compute=compute), storage=tmp_path / "runs", name="run", quiet=True)

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_deleted_folder_is_not_made_anew(train, tmp_path, capfd):
    with pytest.raises(UserError, match=GONE) as caught:
        train(lambda: shutil.rmtree(tmp_path / "runs" / "run"))
    assert "tried for 0 s" in str(caught.value)
    assert "the same command resumes" in str(caught.value)
    assert not (tmp_path / "runs" / "run").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_renamed_storage_is_not_made_anew(train, tmp_path, capfd):
    with pytest.raises(UserError, match=GONE):
        train(lambda: (tmp_path / "runs").rename(tmp_path / "moved"))
    assert not (tmp_path / "runs").exists()
    assert (tmp_path / "moved" / "run" / "checkpoints" / "checkpoint_000000.pt").is_file()
    assert "Traceback" not in capfd.readouterr().err


def test_another_run_in_its_place_stays_as_it_is(train, smoke_none, tmp_path):
    folder = tmp_path / "runs" / "run"

    def another_takes_its_place() -> None:
        folder.rename(tmp_path / "moved")
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        (folder / lock.FILE).write_text("theirs")
        (folder / "metrics.jsonl").write_text("theirs\n")

    with pytest.raises(UserError, match=GONE):
        train(another_takes_its_place)
    assert files(folder) == {"run.json": b"{}", lock.FILE: b"theirs", "metrics.jsonl": b"theirs\n"}


@pytest.mark.parametrize("way", ["renamed", "copied"])
def test_a_folder_that_comes_back_is_written_on(way, train, tmp_path):
    """A copy has another inode, as a file system that is mounted again may give; run.json tells whose it is."""
    folder, aside = tmp_path / "runs" / "run", tmp_path / "aside"

    def back() -> None:  # in one step: a folder that is half there would be written to
        source = aside if way == "renamed" else Path(shutil.copytree(aside, tmp_path / "copy"))
        source.rename(folder)

    timer = threading.Timer(0.3, back)

    def goes() -> None:
        folder.rename(aside)
        timer.start()

    result = train(goes, patience_s=60)
    timer.join()
    assert result is not None
    assert {"run.json", "result.json", "metrics.jsonl", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_every_write_looks_first(tmp_path, smoke_none, digits):
    """Whatever a RunFolder offers to write: none of it appears in another folder."""
    import torch

    from data_prep.dataset.manifest import open_dataset
    from dbd_dist.models.heads import Classifier
    from dbd_dist.runtime.checkpoint import Checkpoints, StageStore
    from dbd_dist.runtime.progress import ProgressFile

    dataset, folder = open_dataset(digits), RunFolder(tmp_path / "run")
    folder.claim(smoke_none, dataset)
    folder.hold()
    folder.path.rename(tmp_path / "moved")
    folder.path.mkdir()
    state, row = {"rows": []}, {"stage": "supervised", "epoch": 1, "epochs": 2, "loss": 1.0}
    network = Classifier(smoke_none.model, 10)
    table = {name: torch.zeros(4) for name in ("loss", "kept")}
    checkpoints = Checkpoints(folder.checkpoints, is_main=True, check=folder.check)
    for write in (
        folder.write_rows,
        lambda: folder.restore([row]),
        lambda: folder.write_split(table),
        lambda: folder.write_features(torch.arange(4), torch.zeros(4, 2), "ssl"),
        lambda: folder.write_model(network.state_dict(), smoke_none, dataset, smoke_none.normalise),
        lambda: folder.write_backbone(network.backbone.state_dict(), smoke_none, dataset, smoke_none.normalise),
        lambda: folder.write_result({}),
        lambda: StageStore(tmp_path / "run" / "stages", check=folder.check).save("simclr", "k", state),
        lambda: (checkpoints.save(state), checkpoints.flush()),
    ):
        with pytest.raises((OSError, UserError), match=GONE):
            write()
    folder.log(row)  # kept in memory
    ProgressFile(folder.progress, check=folder.check).tick("supervised", 1, 1, 1, 1)
    checkpoints.close()
    assert list(folder.path.iterdir()) == []


def may_unmount() -> bool:
    try:
        done = subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs none /mnt && umount -l /mnt"], timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


MOUNTED = """
import subprocess, sys
from pathlib import Path
from dbd_dist.cli import main
from dbd_dist.runtime.reporter import Reporter

report = Reporter.report
def reported(self, end):
    report(self, end)
    if (end.stage, end.epoch) == ("supervised", 1):
        subprocess.run(["umount", "-l", sys.argv[1]], check=True)
Reporter.report = reported
flags = "--method none --launcher local --name run --supervised.batch 60 --compute.patience-s 1 --compute.workers 1"
code = main(["train", "smoke", "--storage", sys.argv[1], "--data", sys.argv[2], *flags.split()])
print("left", [str(p) for p in Path(sys.argv[1]).rglob("*")])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_mount_that_goes_away_is_noticed(digits, tmp_path):
    if not may_unmount():
        pytest.skip("needs the right to mount")
    (tmp_path / "mount").mkdir()
    inside = 'mount -t tmpfs none "$1" && exec "$0" -c "$3" "$1" "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, sys.executable, str(tmp_path / "mount"), str(digits), MOUNTED],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert GONE in done.stderr
    assert "Traceback" not in done.stderr
    assert "left []" in done.stdout
