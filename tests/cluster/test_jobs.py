"""Jobs on a running cluster: `ray start --head` with a token, then `ray job submit` as docs/clusters.md has it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster import session

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_S = 90.0
STOP_S = 60.0


@dataclass(frozen=True)
class Head:
    dashboard: str
    folder: Path
    """Ray's temporary files."""
    environ: dict[str, str]
    """For what talks to it."""

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from the project's folder; waits for the job's end."""
        return subprocess.run(
            [BIN / "ray", "job", "submit", "--address", self.dashboard, "--working-dir", ".", "--", *entrypoint],
            cwd=ROOT,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def packages(self) -> list[Path]:
        """Working directories of jobs, unpacked."""
        return list(self.folder.glob("ray/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/"))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of this machine alone, with folder, ports and token of its own."""
    with ExitStack() as stack:
        # not pytest's folder: the paths of Ray's sockets may have 107 characters
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)))
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        environ = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", *session.AUTH_VARIABLES)}
        environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # at its end nothing is left to wait for
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # jobs find `dbd` as the head does
        }
        gcs, dashboard, client, agent = free_ports(4)
        output = stack.enter_context(open(folder / "output", "w"))
        process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--num-cpus", "2", "--node-ip-address", "127.0.0.1",
                "--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
                "--ray-client-server-port", str(client), "--dashboard-agent-listen-port", str(agent),
            ],
            cwd=folder,
            env=environ,
            stdout=output,
            stderr=output,
        )  # fmt: skip
        stack.callback(stop, process)
        url = f"http://127.0.0.1:{dashboard}"
        end = time.monotonic() + START_S
        while status(url, token.read_text()) != 200:
            assert process.poll() is None, (folder / "output").read_text()
            assert time.monotonic() < end, (folder / "output").read_text()
            time.sleep(0.2)
        yield Head(dashboard=url, folder=folder, environ=environ)


def stop(process: subprocess.Popen) -> None:
    """End `ray start --block` and what it started: by pids, since `ray stop` would end every Ray of the machine."""
    parent = psutil.Process(process.pid)
    started = parent.children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(started, timeout=5)
    for child in alive:  # psutil tells a process from a later one with its pid
        child.kill()
    psutil.wait_procs(alive, timeout=5)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def status(url: str, token: str | None) -> int | None:
    """What the dashboard answers; None where nothing does."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        return urllib.request.urlopen(urllib.request.Request(f"{url}/api/jobs/", headers=headers), timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_a_submitted_run_ends_with_its_result(head, tmp_path):
    job = head.submit("dbd", "train", "smoke", "--method", "none", "--name", "job", "--storage", str(tmp_path))
    assert job.returncode == 0, job.stdout
    result = json.loads((tmp_path / "job" / "result.json").read_text())
    assert (result["preset"], result["method"], result["world_size"]) == ("smoke", "none", 2)
    assert str(tmp_path / "job") in job.stdout  # what the command prints reaches the submitter

    (package,) = head.packages()
    packed = {p.name for p in package.iterdir()}
    assert packed >= {"pyproject.toml", "dbd_dist", "data_prep", "cluster", "tune_spaces"}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")}
    assert ".venv" in ignored
    assert not packed & (ignored | {".git"})
    assert result["commit"] is None  # so the code that ran was the package's, not this checkout's


def test_a_job_that_fails_is_a_submit_that_fails(head):
    job = head.submit("dbd", "train", "smokey")
    assert job.returncode != 0
    assert "there is no preset 'smokey'" in job.stdout


def test_without_the_token_nothing_is_let_in(head):
    assert status(head.dashboard, None) == 401
    assert status(head.dashboard, secrets.token_hex(32)) == 403
