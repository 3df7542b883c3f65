"""RUN/logs: one JSON object a line, of what happened to a run, whatever the storage does meanwhile."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import pytest

from data_prep.errors import UserError
from dbd_dist.config import override
from dbd_dist.launch.local import run_local
from dbd_dist.runtime import logs
from dbd_dist.runtime.machine import versions
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.run_folder import RunFolder
from dbd_dist.runtime.stopping import Stopped


def read(folder: Path, name: str = "rank0") -> list[dict]:
    return [json.loads(line) for line in (folder / logs.FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_a_line_says_when_where_and_what(tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    with logs.log_to(tmp_path, run="mine", rank=2):
        logs.in_stage("warmup")
        logs.event("checkpoint written", bytes=7, path=tmp_path)
        logs.event("stop requested", level=logging.WARNING, stage=None)
    first, second = read(tmp_path, "rank2")
    assert first.keys() == {"time", "level", "run", "rank", "host", "pid", "stage", "event", "bytes", "path"}
    assert before <= datetime.fromisoformat(first["time"]) <= datetime.now(UTC)
    assert first["time"].endswith("+00:00")
    expected = ("info", "mine", 2, "warmup", "checkpoint written", 7, str(tmp_path))
    assert tuple(first[k] for k in ("level", "run", "rank", "stage", "event", "bytes", "path")) == expected
    assert (second["level"], second["stage"]) == ("warning", None)


def test_warnings_and_messages_of_torch_come_too(tmp_path):
    with logs.log_to(tmp_path, run="mine", rank=0):
        with pytest.warns(UserWarning, match="odd"):  # whoever shows warnings still does
            warnings.warn("odd", stacklevel=1)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning("uneven", UserWarning, "file.py", 3)
        logging.getLogger("torch").warning("slow %s", "path")
        logging.getLogger("elsewhere").warning("not ours")
    found = [(row["event"], row["level"], row.get("logger"), row.get("where")) for row in read(tmp_path)]
    assert found == [("uneven", "warning", None, "file.py:3"), ("slow path", "warning", "torch", None)]


def test_a_failure_comes_with_its_traceback_and_goes_on(tmp_path):
    with pytest.raises(ZeroDivisionError), logs.log_to(tmp_path, run="mine", rank=0):
        print(1 / 0)
    (row,) = read(tmp_path)
    assert (row["event"], row["level"], row["type"]) == ("failure", "error", "ZeroDivisionError")
    assert row["traceback"].startswith("Traceback")
    assert "1 / 0" in row["traceback"]


def test_outside_of_a_log_nothing_is_written(tmp_path, capfd):
    with logs.log_to(tmp_path, run="mine", rank=0):
        pass
    logs.event("late", level=logging.ERROR)
    assert not (tmp_path / logs.FOLDER / "rank0.jsonl").exists()
    assert capfd.readouterr() == ("", "")
    assert not logging.getLogger("dbd_dist").handlers


SPEAK = """
import logging, sys
from pathlib import Path
from dbd_dist.runtime import logs
log = logging.getLogger("dbd_dist.runtime.checkpoint")
with logs.log_to(Path(sys.argv[1]), run="mine", rank=0):
    log.info("quiet", extra={"path": "here"})
    log.warning("trying %s", "again")
    logs.event("loud", level=logging.ERROR)
log.warning("after")
"""


def test_warnings_of_our_modules_reach_the_terminal_too(tmp_path):
    """In a process of its own: pytest has handlers everywhere."""
    done = subprocess.run([sys.executable, "-c", SPEAK, str(tmp_path)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "trying again\nafter\n")
    rows = read(tmp_path)
    assert [(row["event"], row["level"]) for row in rows] == [
        ("quiet", "info"), ("trying again", "warning"), ("loud", "error")
    ]  # fmt: skip
    assert [row.get("logger") for row in rows] == ["dbd_dist.runtime.checkpoint"] * 2 + [None]
    assert rows[0]["path"] == "here"


def test_a_stop_on_request_is_no_failure(tmp_path):
    with pytest.raises(Stopped), logs.log_to(tmp_path, run="mine", rank=0):
        raise Stopped("stopped after simclr, epoch 1", exit_code=143)
    (row,) = read(tmp_path)
    assert (row["event"], row["level"]) == ("stopped", "info")


def test_a_log_stays_below_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    with logs.log_to(tmp_path, run="mine", rank=0):
        for number in range(100):
            logs.event("again", number=number)
    files = sorted(p.name for p in (tmp_path / logs.FOLDER).iterdir())
    assert files == ["rank0.jsonl", "rank0.jsonl.1", "rank0.jsonl.2"]
    assert all((tmp_path / logs.FOLDER / name).stat().st_size <= 2000 for name in files)
    assert read(tmp_path)[-1]["number"] == 99


def test_the_torn_line_of_a_kill_swallows_nothing(tmp_path):
    with logs.log_to(tmp_path, run="mine", rank=0):
        logs.event("one")
    with open(tmp_path / logs.FOLDER / "rank0.jsonl", "a") as file:
        file.write('{"time": "2')
    with logs.log_to(tmp_path, run="mine", rank=0):
        logs.event("two")
    first, torn, last = (tmp_path / logs.FOLDER / "rank0.jsonl").read_text().splitlines()
    assert [json.loads(first)["event"], torn, json.loads(last)["event"]] == ["one", '{"time": "2', "two"]


def test_storage_that_cannot_be_written_ends_nothing(tmp_path, capfd):
    (tmp_path / logs.FOLDER).write_text("a file in the folder's place")
    with logs.log_to(tmp_path, run="mine", rank=0):
        logs.event("lost")
    (tmp_path / "later" / logs.FOLDER / "rank0.jsonl").mkdir(parents=True)  # opened at the first event
    with logs.log_to(tmp_path / "later", run="mine", rank=0):
        logs.event("lost")
    assert capfd.readouterr() == ("", "")


def test_the_events_of_a_run(smoke_config, tmp_path):
    run_local(smoke_config, storage=tmp_path, name="a/run", quiet=True)
    rows = read(tmp_path / "a" / "run")
    assert {row["run"] for row in rows} == {"a/run"}
    assert rows[0]["event"] == "start"
    assert (rows[0]["world_size"], rows[0]["versions"]) == (1, versions())
    assert rows[-1]["event"] == "finish"
    stages = [(row["event"], row["stage"]) for row in rows if row["event"].startswith("stage ")]
    expected = [(f"stage {word}", stage) for stage in ("simclr", "warmup", "mixmatch") for word in ("begins", "ends")]
    assert stages == expected

    other = override(smoke_config, {"split.keep": 0.25})
    run_local(other, storage=tmp_path, name="other", quiet=True)
    stages = [(row["event"], row["stage"]) for row in read(tmp_path / "other") if row["event"].startswith("stage ")]
    assert stages == [("stage is reused", s) for s in ("simclr", "warmup")] + expected[-2:]

    before = (tmp_path / "other" / logs.FOLDER / "rank0.jsonl").read_bytes()
    run_local(other, storage=tmp_path, name="other", quiet=True)  # finished: nothing happens to it any more
    assert (tmp_path / "other" / logs.FOLDER / "rank0.jsonl").read_bytes() == before


def test_the_traceback_of_a_failed_run_is_in_its_log(smoke_config, tmp_path):
    config = override(smoke_config, {"simclr.lr": 1e30})
    with pytest.raises(UserError):
        run_local(config, storage=tmp_path, name="run", quiet=True)
    last = read(tmp_path / "run")[-1]
    assert (last["event"], last["stage"], last["type"]) == ("failure", "simclr", "Diverged")
    assert "in metrics" in last["traceback"]


# -- what is shown besides, and must not end a run either


def test_a_progress_file_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    progress = ProgressFile(tmp_path / "file" / "progress.json")
    progress.tick("simclr", 1, 1, 1, 1)
    progress.remove()
    whole = ProgressFile(tmp_path / "progress.json")
    whole.tick("simclr", 1, 1, 1, 1)
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 1


def test_a_sentence_is_shown_only_where_it_takes_long(tmp_path):
    progress = ProgressFile(tmp_path / "progress.json")
    with progress.saying("measuring", after_s=60):
        pass
    assert not (tmp_path / "progress.json").exists()
    with progress.saying("measuring", after_s=0.0):
        deadline = time.monotonic() + 60
        while not (tmp_path / "progress.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert json.loads((tmp_path / "progress.json").read_text())["says"] == "measuring"
    progress.remove()
    assert list(tmp_path.iterdir()) == []


def test_event_files_that_cannot_be_written_end_nothing(tmp_path):
    (tmp_path / "tensorboard").write_text("a file in the folder's place")
    folder = RunFolder(tmp_path)
    row = {"stage": "simclr", "epoch": 1, "epochs": 2, "loss": 1.0}
    with logs.log_to(tmp_path, run="mine", rank=0):
        folder.log(row)
        folder.log(row | {"epoch": 2})
    assert [r["epoch"] for r in folder.rows("simclr")] == [1, 2]
    assert [r["event"] for r in read(tmp_path)] == ["event files cannot be written", "stage ends"]
    folder.write_result({})
    assert folder.result() == {}


class FullDisk:
    """An event file on a full disk."""

    def add_scalars(self, *_: object) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_disk_that_fills_up_ends_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder._events = FullDisk()
    folder.log({"stage": "simclr", "epoch": 1, "epochs": 2, "loss": 1.0})
    folder._events = FullDisk()
    folder.write_result({})
