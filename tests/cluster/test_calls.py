"""Calls of Ray's library that are still under way when the command ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.calls import Call, unfinished

ROOT = Path(__file__).resolve().parents[2]


def test_a_call_and_what_it_raises():
    go = threading.Event()

    def fails() -> None:
        go.wait(60)
        raise SystemExit("shut down")

    call = Call(fails)
    assert call.runs(0.01)
    assert unfinished()
    go.set()
    assert not unfinished(60.0)
    assert not call.runs()
    assert isinstance(call.error, SystemExit)
    done = Call(lambda: None)
    assert not done.runs(60.0)
    assert done.error is None


@pytest.mark.parametrize(
    ("then", "code"),
    [("sys.argv = ['dbd', 'trian']", 2), ("cli._main = lambda *_, **__: sys.exit(143)", 143), ("", 0)],
)
def test_a_command_ends_beside_a_call_that_never_returns(then, code):
    """With its exit code, its output and what is to be done at the end, and without tearing Python down, which would
    end the thread inside Ray."""
    lines = [
        "import atexit, sys, threading",
        "from cluster.calls import Call",
        "from dbd_dist import cli",
        "class Torn:",
        "    def __del__(self): print('torn down', flush=True)",
        "torn = Torn()",
        "sys.argv = ['dbd', 'help']",
        then,
        "Call(threading.Event().wait)",
        "atexit.register(print, 'at the end')",
        "sys.exit(cli.main())",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "at the end" in done.stdout
    assert "torn down" not in done.stdout
    assert ("usage: dbd" in done.stdout) == (code == 0)
