"""What a process leaves is ended with it, and nothing else is."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import reaper, session

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

SLEEP = "import time; time.sleep(100)"
FAMILY = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print(child.pid, flush=True)
time.sleep(100)
"""
OWNER = f"""
import subprocess, sys, time
from pathlib import Path
from cluster import session
ray = subprocess.Popen([sys.executable, "-c", {FAMILY!r}], stdout=subprocess.PIPE, text=True)
grandchild = int(ray.stdout.readline())
other = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
guard = session._guard(Path(sys.argv[1]))
session._tell(guard, [ray.pid])
time.sleep(1.5)  # longer than between two looks
print(ray.pid, grandchild, other.pid, guard.pid, flush=True)
if sys.argv[2] == "killed":
    time.sleep(100)
session._end(guard)
"""


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", ["killed", "at its end"])
def test_the_family_ends_with_its_owner(tmp_path, how):
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "token").write_text("secret")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert owner.stdout is not None
    root, grandchild, other, guard = map(int, owner.stdout.readline().split())
    try:
        if how == "killed":
            psutil.Process(guard).send_signal(signal.SIGTERM)  # meant for the command's group: it stays
            assert not gone(guard, within_s=0.3)
            psutil.Process(root).kill()  # the grandchild is nobody's then; it was seen before
            owner.kill()
        owner.wait(20)
        assert gone(root)
        assert gone(grandchild)
        assert gone(guard)
        assert not folder.exists()
        assert psutil.pid_exists(other)  # not Ray's
    finally:
        for pid in (other, root, grandchild):
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


STARTER = """
import os, signal, sys, tempfile
from pathlib import Path
from cluster import session
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
guard = session._guard(folder)
with session._start_watched(folder):
    print("a warning of others", file=sys.stderr)
    LINE = "[2026-01-02 15:29:20,235 E 7 7] core_worker.cc:247: Failed to register: IOError: end of file"
    if sys.argv[2] == "ended":
        os.write(2, (LINE + "\\n(a frame of the library)\\n").encode())
        os._exit(1)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
print("running", file=sys.stderr)
session._end(guard)
"""
FAILED = "error: Ray could not be started (Failed to register: IOError: end of file)"


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("started", 0, ["a warning of others", "running"]),
        ("killed", -9, ["a warning of others"]),
        ("ended", 1, ["a warning of others", FAILED]),
    ],
)
def test_a_start_that_ray_ends_has_its_message(tmp_path, how, code, says):
    argv = [sys.executable, "-c", STARTER, str(tmp_path), how]
    done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])  # all who hold it end
    assert done.returncode == code
    assert [line.partition(". Hint: ")[0] for line in done.stderr.splitlines()] == says
    assert ("the same command starts again" in done.stderr) == (how == "ended")
    assert list(tmp_path.iterdir()) == []


def test_families_are_followed_and_reused_pids_are_not():
    now = {1: (0, 1), 10: (1, 50), 11: (10, 60), 12: (11, 70), 20: (1, 55), 21: (20, 56)}
    assert reaper.grown(set(), [10], now) == {(10, 50), (11, 60), (12, 70)}
    orphaned = {1: (0, 1), 11: (1, 60), 12: (11, 70), 13: (12, 90), 10: (1, 99), 14: (10, 100)}  # 10 is another now
    assert reaper.grown({(10, 50), (11, 60)}, [], orphaned) == {(11, 60), (12, 70), (13, 90)}
    assert reaper.grown({(10, 50)}, [30], {1: (0, 1)}) == set()


def test_running_knows_this_process():
    parent, start = reaper.running()[psutil.Process().pid]
    assert parent == psutil.Process().ppid()
    assert start > 0


def test_ends_of_processes_in_words():
    assert session.how_it_ended(-9) == "was ended by SIGKILL"
    assert session.how_it_ended(-200) == "was ended by signal 200"
    assert session.how_it_ended(3) == "ended with exit code 3"
