"""A Ray of our own, as far as no Ray is needed: its folder, its second try. Its ports are in test_session.py."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import guard, own_ray
from data_prep.errors import UserError


@pytest.fixture
def short() -> Iterator[Path]:
    """pytest's own folders have paths too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_the_folder_is_private_and_removed(short):
    with own_ray.private_folder({"RAY_TMPDIR": str(short)}) as folder:
        assert folder.parent == short
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "r").mkdir()
        with own_ray.private_folder({"RAY_TMPDIR": str(short)}) as other:  # it leaves the one in use alone
            assert folder.exists()
            assert other != folder
    assert list(short.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_does_not_enter():
    with own_ray.private_folder({"RAY_TMPDIR": "/tmp"}) as folder:
        (folder / "r").mkdir()
        (folder / "r").chmod(0o777)  # as Ray leaves it
        (folder / "r" / "log").write_text("x")
        look = "import os, sys; os.setgid(65534); os.setuid(65534); print(open(sys.argv[1]).read())"
        done = subprocess.run(
            [sys.executable, "-c", look, str(folder / "r" / "log")], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "PermissionError" in done.stderr


def test_the_folder_of_a_killed_process_goes(short):
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; from cluster import own_ray\n"
        "with own_ray.private_folder({'RAY_TMPDIR': sys.argv[1]}): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(short), *sys.path], check=False)
    (stale,) = short.iterdir()
    with own_ray.private_folder({"RAY_TMPDIR": str(short)}):
        assert not stale.exists()


def test_a_long_tmpdir_is_avoided_or_named(tmp_path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    with own_ray.private_folder({"TMPDIR": str(long)}) as folder:
        assert folder.parent == Path("/tmp")
        assert len(f"{folder}{own_ray.SOCKET}") <= own_ray.LONGEST_SOCKET
    with (
        pytest.raises(UserError, match=r"RAY_TMPDIR has \d+ characters.*Expected: at most 20"),
        own_ray.private_folder({"RAY_TMPDIR": str(long)}),
    ):
        pass


class Init:
    """Stands for ray.init: raises these errors, one a call."""

    def __init__(self, *errors: str):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.errors:
            raise RuntimeError(self.errors.pop(0))


SLOW = "The current node timed out during startup."


def test_a_slow_start_is_tried_once_more(capsys):
    init = Init(SLOW)
    own_ray._start(init)
    assert init.calls == 2
    assert "once more, with 180 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("errors", "calls", "hint"),
    [((SLOW, SLOW), 2, "the machine is busy"), (("No space left on device",), 1, "RAY_TMPDIR"), (("x",), 1, "again")],
)
def test_what_does_not_start_is_one_message(errors, calls, hint):
    init = Init(*errors)
    with pytest.raises(own_ray.StartError, match=hint) as caught:
        own_ray._start(init)
    assert init.calls == calls
    assert caught.value.exit_code == 1


def test_what_a_failed_start_left_is_ended():
    left: list[subprocess.Popen] = []

    def init() -> None:
        left.append(subprocess.Popen(["sleep", "600"]))
        raise RuntimeError("x")

    with pytest.raises(own_ray.StartError):
        own_ray._start(init)
    assert not Path(f"/proc/{left[0].pid}").exists()
    left[0].returncode = -9  # it was reaped there


def test_the_second_try_is_patient(monkeypatch):
    from ray._private import services

    answers = [RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}]

    def get_node(*_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(services, "get_node", get_node)
    with own_ray._patient():
        assert services.get_node("a", "b") == {"node": 1}
    assert services.get_node is get_node


def test_it_is_guarded_from_its_start_until_it_is_shut_down(short, monkeypatch):
    """Shutting it down ends its processes on purpose."""
    import ray

    def guards() -> int:
        return sum(thread.name == guard.THREAD for thread in threading.enumerate())

    seen: list[tuple[str, int]] = []
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    monkeypatch.setattr(guard, "own_processes", list)
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(("init", guards())))
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append(("shutdown", guards())))
    with own_ray.running():
        seen.append(("runs", guards()))
    assert seen == [("init", 0), ("runs", 1), ("shutdown", 0)]
