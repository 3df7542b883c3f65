"""One driver at a time: locks between processes, what a kill leaves, forks, storage without locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.launch import ray_train as launch
from dbd_dist.launch.local import run_local

HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from data_prep.io import lock
with lock.held(Path(sys.argv[1]), "the run"):
    {also}
    print("held", flush=True)
    sys.stdin.read()
"""

Holder = Callable[..., subprocess.Popen]


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Starts another process that holds a lock until its input ends, and does something more once it has it."""
    with ExitStack() as after:

        def start(path: Path, also: str = "pass") -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", HOLD.format(also=also), str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            after.callback(end, process)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return process

        yield start


def end(process: subprocess.Popen) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()


def is_free(path: Path) -> bool:
    try:
        with lock.held(path, "the run"):
            return True
    except UserError:
        return False


def test_a_second_process_learns_who_holds_it(holder, tmp_path):
    path = tmp_path / "run" / ".lock"
    process = holder(path)
    with pytest.raises(UserError) as caught, lock.held(path, str(path.parent)):
        pass
    error = caught.value
    assert error.where == str(path.parent)
    assert f"process {process.pid} on {socket.gethostname()} since 20" in error.what
    assert "--name" in str(error.hint)
    process.stdin.close()
    assert process.wait() == 0
    assert not (tmp_path / "run").exists()  # it made the folder, and nothing came into it
    assert is_free(path)


def test_within_one_process_too(tmp_path):
    with lock.held(tmp_path / ".lock", "the run"):
        assert not is_free(tmp_path / ".lock")
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    assert is_free(tmp_path / ".lock")


@pytest.mark.parametrize("also", ["pass", "subprocess.Popen(['sleep', '60'])", "os.fork() or time.sleep(60)"])
def test_a_kill_lets_go_whatever_the_holder_has_started(holder, tmp_path, also):
    """A started program and a forked child live on; neither keeps the lock."""
    path = tmp_path / ".lock"
    process = holder(path, also)
    assert not is_free(path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert path.exists()
    deadline = time.monotonic() + 10  # the child may not have begun yet
    while not is_free(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_free(path)
    assert not path.exists()


def test_a_file_that_its_holder_removed_is_no_lock(tmp_path, monkeypatch):
    """The file is opened, then its holder removes it and ends, then it is locked: another may have the new file."""
    path = tmp_path / ".lock"
    first = lock.held(path, "the run")
    first.__enter__()
    flock = fcntl.flock

    def after_the_holder_ended(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_the_holder_ended)
    with lock.held(path, "the run"):
        assert path.exists()  # the one that we hold has the name
        assert not is_free(path)


@pytest.mark.slow
def test_on_ray_too_and_before_it_starts(holder, smoke_config, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.session, "connect", lambda **_: pytest.fail("Ray is not needed"))
    process = holder(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        launch.run_ray(smoke_config, storage=tmp_path, name="run", quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_storage_without_locks_is_a_warning(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no file locks"), lock.held(tmp_path / ".lock", "the run"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be locked"), lock.held(tmp_path / "file" / ".lock", "the run"):
        pass


def test_a_run_is_refused_while_another_has_its_folder(holder, smoke_config, tmp_path):
    process = holder(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        run_local(smoke_config, storage=tmp_path, name="run", quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_what_a_killed_command_left_in_a_finished_run_goes(smoke_none, tmp_path):
    config = smoke_none
    run_local(config, storage=tmp_path, name="run", quiet=True)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    (tmp_path / "run" / lock.FILE).write_text("{}")
    (tmp_path / "run" / "progress.json").write_text("{}")
    assert run_local(config, storage=tmp_path, name="run", quiet=True) is not None
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
