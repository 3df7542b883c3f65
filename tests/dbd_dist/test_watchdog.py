"""Runs that hang are found, reported and ended; slow ones are left alone. Every run is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dbd_dist.fields import to_dict
from dbd_dist.runtime import logs, watchdog

LIMIT_S = 4.0

SCRIPT = """
import ctypes, json, os, sys, threading, time
from pathlib import Path
from dbd_dist.runtime import watchdog
from dbd_dist.config import TrainConfig, from_dict
from dbd_dist.launch.local import run_local

def wait_for_a_lock_that_is_never_freed():
    threading.Event().wait()

def hold_the_interpreter():
    time.sleep(3)  # until the thread has set the limit of a step
    ctypes.PyDLL(None).sleep(60)

def be_slow():
    time.sleep({limit_s} / 5)

watchdog.START_FACTOR = 30  # whatever else runs on this machine
real, steps = watchdog.ticking, 0

def ticking(then):
    tick = real(then)
    def after(*where):
        global steps
        tick(*where)
        steps += 1
        if int(os.environ.get("RANK", "0")) == {rank} and {when}:
            {what}()
    return after

watchdog.ticking = ticking
config = from_dict(TrainConfig, json.loads(Path({described!r}).read_text()))
run_local(config, storage=Path({storage!r}), name="run", quiet=True)
"""


@pytest.fixture
def script(smoke_config, tmp_path):
    """Writes a program that runs the smoke preset, and in which a rank does something after some of its steps."""

    def write(what: str, when: str = "steps == 2", rank: int = 0, limit_s: float = LIMIT_S) -> Path:
        described, path = tmp_path / "described.json", tmp_path / "program.py"
        config = replace(smoke_config, stop_after="simclr", compute=replace(smoke_config.compute, stall_s=limit_s))
        described.write_text(json.dumps(to_dict(config)))
        path.write_text(
            SCRIPT.format(
                what=what, when=when, rank=rank, limit_s=limit_s, described=str(described), storage=str(tmp_path)
            )
        )
        return path

    return write


def start(program: Path, *launcher: str) -> tuple[int, str, float]:
    """Exit code, stderr and seconds of a program."""
    begin = time.monotonic()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, *launcher, str(program)], capture_output=True, text=True, env=env)
    return done.returncode, done.stderr, time.monotonic() - begin


def events(folder: Path, rank: int = 0) -> list[dict]:
    return [json.loads(line) for line in (folder / logs.FOLDER / f"rank{rank}.jsonl").read_text().splitlines()]


HANG = """
import sys, threading
from pathlib import Path
from dbd_dist.runtime import watchdog

def wait_for_ever():
    threading.Event().wait()

with watchdog.watching(Path(sys.argv[1]), rank=3, limit_s=2.0):
    watchdog.ticking(None)("warmup", 1, 2, 7, 9)
    wait_for_ever()
"""


def test_a_process_that_hangs_leaves_its_stacks_and_ends(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == watchdog.EXIT_CODE
    (stacks,) = watchdog.stacks(tmp_path)
    assert stacks.name.startswith("rank3-")
    text = stacks.read_text()
    assert "in wait_for_ever" in text
    assert "rank   3\n" in text
    assert "at     warmup, epoch 1 of 2, step 7 of 9\n" in text
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert str(stacks) in done.stderr


PAUSED = """
import sys, time
from pathlib import Path
from dbd_dist.runtime import watchdog

with watchdog.watching(Path(sys.argv[1]), rank=0, limit_s=2.0):
    for step in range(1, 16):
        watchdog.ticking(None)("warmup", 1, 1, step, 15)
        print(step, flush=True)
        time.sleep(0.2)
"""


@pytest.mark.slow
def test_ctrl_z_is_no_hang(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", PAUSED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(4)  # longer than all that a watchdog allows: the limit, what it lingers and twice its poll
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0].split()[-1] == "15"
    assert process.returncode == 0
    assert watchdog.stacks(tmp_path) == []


@pytest.mark.slow
def test_a_run_that_hangs_leaves_its_stacks_and_ends(script, tmp_path):
    code, message, _ = start(script("wait_for_a_lock_that_is_never_freed"))
    assert code == watchdog.EXIT_CODE, message
    (stacks,) = watchdog.stacks(tmp_path / "run")
    text = stacks.read_text()
    assert "in wait_for_a_lock_that_is_never_freed" in text
    assert "in train_epoch" in text
    assert "rank   0\n" in text
    assert "at     simclr, epoch 1 of 2, step 2 of 4\n" in text
    (line,) = (line for line in message.splitlines() if line.startswith("error: "))
    assert str(stacks) in line
    assert "the same command resumes from the last checkpoint" in line
    (stall,) = (row for row in events(tmp_path / "run") if row["event"] == "stall")
    assert LIMIT_S <= stall["seconds"] < 2 * LIMIT_S
    assert (stall["level"], stall["stage"], stall["stacks"]) == ("error", "simclr", str(stacks))


@pytest.mark.slow
def test_a_run_that_holds_the_interpreter_is_ended_too(script, tmp_path):
    code, message, seconds = start(script("hold_the_interpreter"))
    assert code == 1, message  # all that faulthandler can do
    assert seconds < 60
    assert watchdog.stacks(tmp_path / "run") == []
    watchdog.collect(tmp_path / "run")
    (stacks,) = watchdog.stacks(tmp_path / "run")
    text = stacks.read_text()
    assert "in hold_the_interpreter" in text
    assert "step 2 of 4" in text


@pytest.mark.slow
def test_a_run_that_is_slow_is_left_alone(script, tmp_path):
    code, message, seconds = start(script("be_slow", when="True"))
    assert code == 0, message
    assert seconds > LIMIT_S  # its eight steps together
    assert not (tmp_path / "run" / watchdog.FOLDER).exists()
    assert [p.name for p in (tmp_path / "run" / logs.FOLDER).iterdir()] == ["rank0.jsonl"]


@pytest.mark.slow
def test_every_rank_leaves_its_stacks(script, tmp_path):
    program = script("wait_for_a_lock_that_is_never_freed", rank=1, limit_s=2 * LIMIT_S)
    code, message, _ = start(program, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert code != 0
    first, second = sorted(watchdog.stacks(tmp_path / "run"))
    assert (first.name[:6], second.name[:6]) == ("rank0-", "rank1-")
    assert "in wait_for_a_lock_that_is_never_freed" in second.read_text()
    assert "in wait_for_a_lock_that_is_never_freed" not in first.read_text()
    assert "in train_epoch" in first.read_text()  # it waits for the other one
    assert message.count("error: ") >= 1


def test_beats_keep_a_watchdog_quiet_and_it_leaves_nothing(tmp_path):
    with watchdog.watching(tmp_path, rank=0, limit_s=2.0):
        watchdog.ticking(None)("simclr", 1, 2, 1, 4)
        for _ in range(30):
            time.sleep(0.1)
            watchdog.beat()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    watchdog.beat()  # there is no watchdog


@pytest.mark.slow
def test_a_process_that_comes_back_is_not_ended(tmp_path):
    """Found stuck, its stacks are written; before it is ended it makes a step."""
    with watchdog.watching(tmp_path, rank=0, limit_s=1.0):
        assert watchdog._current is not None
        watchdog._current._linger = 3.0  # this thread may be late on a busy machine
        watchdog.ticking(None)("simclr", 1, 2, 1, 4)
        deadline = time.monotonic() + 10
        while not watchdog.stacks(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(35):
            watchdog.beat()
            time.sleep(0.1)
    (stacks,) = watchdog.stacks(tmp_path)
    assert "test_a_process_that_comes_back" in stacks.read_text()


def test_nothing_is_watched_with_a_limit_of_0(tmp_path):
    with watchdog.watching(tmp_path, rank=0, limit_s=0):
        assert watchdog._current is None
    assert list(tmp_path.iterdir()) == []


def test_a_stall_that_was_got_over_is_no_reason_for_a_failure(tmp_path):
    """Only what the workers that failed last have left is named."""
    folder = tmp_path / watchdog.FOLDER
    folder.mkdir()
    old, early, last = (folder / f"rank{i}-2026010{i}T000000Z.txt" for i in range(1, 4))
    for path, pid in ((old, 11), (early, 22), (last, 333)):
        path.write_text(f"no step for 900 s\nhost   here\npid    {pid}\nat     simclr\n")
    assert watchdog.stacks(tmp_path) == [old, early, last]
    assert watchdog.stalled(tmp_path, [old], died="Worker(pid=11, ...): out of memory, pid=3333,") is None
    found = watchdog.stalled(tmp_path, [old], died="actor died\n    pid=333,\n")
    assert found is not None
    assert str(last) in str(found)
    assert str(early) not in str(found)
