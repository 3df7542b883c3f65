"""`dbd prepare` that is ended in the middle, and two of them at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.atomic import replacing_folder, temporary
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from data_prep.sources.source import OpenSource
from dbd_dist.cli import main

ARGUMENTS = ["prepare", "digits", "--train-per-class", "3", "--test-per-class", "1", "--workers", "1"]
PAUSED = """
import sys
from data_prep import pipeline
from dbd_dist.cli import main

write = pipeline._write

def paused(*arguments):
    print("writing", flush=True)
    sys.stdin.readline()
    return write(*arguments)

pipeline._write = paused
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def signals_end() -> Iterator[None]:
    """As in a terminal: nohup starts what it runs, these tests too, with SIGHUP ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start() -> Iterator:
    """Starts another process that prepares the set, and gives it once it is about to write."""
    with ExitStack() as after:

        def run(out: Path) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", PAUSED, *ARGUMENTS, "--out", str(out)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            after.enter_context(process)
            after.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            return process

        yield run


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_leaves_nothing(number, tmp_path, monkeypatch):
    def write(*_: object) -> None:
        assert len(names(tmp_path / "sets")) == 2  # the folder and its lock
        os.kill(os.getpid(), number)

    monkeypatch.setattr("data_prep.pipeline._write", write)
    with pytest.raises(SystemExit) as caught:
        main([*ARGUMENTS, "--out", str(tmp_path / "sets" / "ds")])
    assert caught.value.code == 128 + number
    assert names(tmp_path) == []
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(number, start, tmp_path):
    process = start(tmp_path / "sets" / "ds")
    assert any(name.endswith(".partial") for name in names(tmp_path / "sets"))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said == f"{number.name}: ended\n"
    assert names(tmp_path) == []


@pytest.mark.slow
def test_what_a_kill_leaves_goes_at_the_next_run(start, tmp_path):
    process = start(tmp_path / "ds")
    process.kill()
    process.wait()
    left = names(tmp_path)
    assert len(left) == 2  # the folder, and the lock that nobody holds
    assert left[0].startswith(".ds.")
    assert main([*ARGUMENTS, "--out", str(tmp_path / "other")]) == 0  # of another set, too
    assert names(tmp_path) == ["other"]
    assert main([*ARGUMENTS, "--out", str(tmp_path / "ds")]) == 0
    assert names(tmp_path) == ["ds", "other"]


def test_what_a_kill_leaves_goes_when_the_same_is_made_again(tmp_path):
    stale = temporary(tmp_path / "ds")
    stale.mkdir()
    (tmp_path / ".ds.lock").touch()
    assert main([*ARGUMENTS, "--out", str(tmp_path / "ds")]) == 0
    assert names(tmp_path) == ["ds"]


@pytest.mark.slow
def test_a_living_writer_keeps_its_folder(start, tmp_path):
    process = start(tmp_path / "ds")
    before = names(tmp_path)
    assert main([*ARGUMENTS, "--out", str(tmp_path / "other")]) == 0
    assert names(tmp_path) == [*before, "other"]
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == ["ds", "other"]


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["well", "killed"])
def test_the_second_of_two_waits(ends, start, tmp_path, capfd):
    process = start(tmp_path / "ds")
    codes: list[int] = []
    second = threading.Thread(target=lambda: codes.append(main([*ARGUMENTS, "--out", str(tmp_path / "ds")])))
    second.start()
    said, deadline = "", time.monotonic() + 60
    while "waiting," not in said and time.monotonic() < deadline:
        said += capfd.readouterr().err
        time.sleep(0.05)
    assert second.is_alive()
    if ends == "well":
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    else:
        process.kill()
        process.wait()
    second.join(60)
    assert codes == [0]
    assert names(tmp_path) == ["ds"]
    open_dataset(tmp_path / "ds")
    said += capfd.readouterr().err
    assert f"waiting, another process is at work on it: process {process.pid} on " in said
    assert ("there already" in said) == (ends == "well")


def test_files_and_other_names_are_not_cleaned_up(tmp_path):
    kept = [".mine", ".ds.partial", ".ds.12345678.part", ".report.html.12345678.partial"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    temporary(tmp_path / "ds").mkdir()
    lock.remove_dead(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_nothing_is_cleaned_up_where_there_are_no_locks(tmp_path, monkeypatch):
    import errno
    import fcntl

    stale = temporary(tmp_path / "ds")
    stale.mkdir()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no file locks"):
        lock.remove_dead(tmp_path)
    assert names(tmp_path) == [stale.name]


def test_a_failure_leaves_no_folder_above(tmp_path, monkeypatch):
    def fail(*_: object) -> OpenSource:
        raise UserError("no")

    monkeypatch.setattr("data_prep.pipeline._write", fail)
    config = PrepareConfig(source=Digits(train_per_class=3, test_per_class=1), out=tmp_path / "a" / "b" / "ds")
    with pytest.raises(UserError, match="no"):
        prepare(config, progress=False)
    assert names(tmp_path) == []


def test_a_name_that_is_taken_meanwhile_stays(tmp_path):
    def write() -> None:
        with replacing_folder(tmp_path / "ds"):
            (tmp_path / "ds").mkdir()
            (tmp_path / "ds" / "theirs").write_text("x")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert names(tmp_path) == ["ds"]
    assert names(tmp_path / "ds") == ["theirs"]
