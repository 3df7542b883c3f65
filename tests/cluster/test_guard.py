"""What happens to a command whose own Ray ends before a run is watched; with other processes in Ray's place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMAND = """
import subprocess, sys, time
from cluster import guard

raylet = subprocess.Popen(["sleep", "600"])
guard.own_processes = lambda: [("raylet,", raylet)]
guard.Guard()
{before}
raylet.{ends}()
raylet.wait()
time.sleep({then_s})
print("went on", flush=True)
"""


def run(**parts: object) -> subprocess.CompletedProcess[str]:
    code = COMMAND.format(**parts)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("ends", "name"), [("kill", "SIGKILL"), ("terminate", "SIGTERM")])
def test_a_ray_that_ends_is_one_message(ends, name):
    done = run(before="", ends=ends, then_s=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: raylet, (pid ")
    assert done.stderr.endswith(f") was ended by {name}. Hint: the same command starts it again.\n")


def test_nothing_is_said_once_another_watches():
    """And where there is no guard, nothing is relieved."""
    done = run(before="guard.relieve(); guard.relieve()", ends="kill", then_s=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
    code = "from cluster import guard; guard.relieve()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
