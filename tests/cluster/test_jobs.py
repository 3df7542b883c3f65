"""Jobs on a running Ray, guarded by a token: `ray job submit` as docs/clusters.md has it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Head:
    dashboard: str
    folder: Path
    """Of Ray's session."""

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """`ray job submit` from the project's folder; waits for the job's end."""
        ray = Path(sys.executable).parent / "ray"
        return subprocess.run(
            [
                ray,
                "job",
                "submit",
                "--address",
                self.dashboard,
                "--working-dir",
                ".",
                "--runtime-env-json",
                '{"excludes": [".git", "tests", "docs"]}',
                "--",
                *entrypoint,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def packages(self) -> list[Path]:
        """Working directories of jobs, unpacked."""
        return list(self.folder.glob("runtime_resources/working_dir_files/_ray_pkg_*/"))


@pytest.fixture
def head(ray_here) -> Head:
    from ray._private import worker

    node = worker._global_node
    assert node is not None
    return Head(f"http://{node.address_info['webui_url']}", Path(node.get_session_dir_path()))


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
    flags = ("--method", "none", "--compute.workers", "1", "--compute.threads", "1")
    job = head.submit("dbd", "train", "smoke", *flags, "--name", "job", "--storage", str(tmp_path))
    assert job.returncode == 0, job.stdout
    result = json.loads((tmp_path / "job" / "result.json").read_text())
    assert (result["preset"], result["method"], result["world_size"]) == ("smoke", "none", 1)
    assert str(tmp_path / "job") in job.stdout  # what the command prints reaches the submitter

    (package,) = head.packages()
    packed = {p.name for p in package.iterdir()}
    assert packed >= {"pyproject.toml", "dbd_dist", "data_prep", "cluster", "tune_spaces"}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.endswith("/")}
    assert ".venv" in ignored
    assert not packed & (ignored | {".git", "tests", "docs"})
    assert result["commit"] is None  # so the code that ran was the package's, not this checkout's


def test_a_submitted_sweep_shows_its_table(head, tmp_path):
    flags = ("--smoke", "--vary", "split.keep=choice(0.4,0.6)", "--name", "sweep", "--storage", str(tmp_path))
    flags += ("--parallel", "1")  # a process less to start
    job = head.submit("dbd", "tune", "filter", *flags)
    assert job.returncode == 0, job.stdout
    (heading,) = [line for line in job.stdout.splitlines() if line.startswith("trial  split.keep")]
    assert "score" in heading
    trials = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["trials"]
    for row in trials:
        value = f"{row['metrics']['score']:.4g}"
        assert any(line.split()[:3] == [str(row["number"]), str(row["values"]["split.keep"]), value]
                   for line in job.stdout.splitlines())  # fmt: skip


def test_a_job_that_fails_is_a_submit_that_fails(head):
    job = head.submit("dbd", "train", "smokey")
    assert job.returncode != 0
    assert "there is no preset 'smokey'" in job.stdout


def test_without_the_token_nothing_is_let_in(head):
    assert status(head.dashboard, None) == 401
    assert status(head.dashboard, os.environ["RAY_AUTH_TOKEN"]) == 200
    assert status(head.dashboard, secrets.token_hex(32)) == 403
