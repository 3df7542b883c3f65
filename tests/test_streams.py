"""Standard output that is closed, full or gone: no traceback, and an exit code that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINTS = """
import sys, types
from dbd_dist import cli
module = types.ModuleType("prints")
def main(argv):
    print("x" * int(argv[0]))
    print("done", file=sys.stderr)
    return 0
module.main = main
sys.modules["prints"] = module
cli.COMMANDS["prints"] = ("prints", "")
sys.exit(cli.main(["prints", sys.argv[1]]))
"""
SIZES = [1, 5_000, 9_000, 100_000, 3_000_000]
"""Below and above the buffers of Python and of a pipe."""


def run(stdout, *argv: str, script: str = PRINTS) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", script, *argv], stdout=stdout, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr.replace("done\n", "")


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_message(size):
    with open("/dev/full", "w") as full:
        code, said = run(full, str(size))
    assert code == 1
    assert said == "error: the output or a file: cannot be read or written (No space left on device).\n"


@pytest.mark.parametrize("size", SIZES)
def test_a_reader_that_has_gone_ends_it_quietly(size):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        assert run(pipe, str(size)) == (141, "")


@pytest.mark.parametrize("argv", [["--help"], ["report", "--help"], ["doctor", "--nonsense"]])
def test_help_too(argv):
    script = "import sys; from dbd_dist.cli import main; sys.exit(main(sys.argv[1:]))"
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        code, said = run(pipe, *argv, script=script)
    assert code in ((2,) if "--nonsense" in argv else (141,))
    assert "Traceback" not in said
    assert "Exception ignored" not in said


CLOSED = """
import os, sys
for number in map(int, sys.argv[3].split(",")):
    os.close(number)
sys.argv[1:2] = [sys.argv[2]]
from dbd_dist import cli
import types
module = types.ModuleType("opens")
def main(argv):
    with open(argv[0], "w") as file:
        os.write(1, b"to standard output")
        os.write(2, b"to standard error")
        assert file.fileno() > 2
    return 0
module.main = main
sys.modules["opens"] = module
cli.COMMANDS["opens"] = ("opens", "")
os._exit(cli.main(["opens", sys.argv[1]]))
"""


@pytest.mark.parametrize("closed", ["1", "2", "0,1,2"])
def test_a_file_does_not_take_the_number_of_a_closed_stream(closed, tmp_path):
    done = subprocess.run([sys.executable, "-c", CLOSED, "", str(tmp_path / "file"), closed], capture_output=True)
    assert done.returncode == 0
    assert Path(tmp_path / "file").read_bytes() == b""


def test_another_broken_pipe_is_a_failure(monkeypatch, capsys):
    from dbd_dist import cli

    def broken(argv):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("dbd_dist.commands.train.main", broken)
    assert cli.main(["train", "smoke"]) == 1
    assert "Broken pipe" in capsys.readouterr().err
