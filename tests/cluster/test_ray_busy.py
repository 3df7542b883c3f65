"""On a real Ray that others use: what is said while a run waits, and how it is ended then; jobs that are stopped.

The tests share one Ray of two CPUs (`ray_here`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import jobs
from data_prep.io.hashes import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.ray]

WAIT_S = 240.0
ENDED_S = 30.0
"""How soon after Ctrl-C a run that waits has ended, and nothing of it is left."""


@pytest.fixture
def held(ray_here) -> Iterator[str]:
    """All CPUs are held by an actor."""
    import ray

    class Holder:
        def ready(self) -> bool:
            return True

    holder: Any = ray.remote(num_cpus=2)(Holder).remote()
    assert ray.get(holder.ready.remote())
    yield ray_here
    ray.kill(holder)


def start(address: str, output: Path, *argv: str) -> subprocess.Popen:
    with open(output, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dbd_dist", *argv],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def wait_for(condition: Any) -> Any:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"nothing happened in {WAIT_S:.0f} s")


def left_behind(before: Collection[str] = ()) -> dict[str, str]:
    """Actors and placement groups that are there or to come, by their ids, without those that were there before, the
    fixture's, and those that Ray makes once for a cluster and keeps. Ray Train's cleaner, which holds nothing, is
    not counted either: where this process has trained on the same cluster before, Ray 2.60 leaves it."""
    from ray.util.state import list_actors, list_placement_groups

    rows: list[Any] = [*list_actors(filters=[("state", "!=", "DEAD")])]
    kept = ("Holder", "TrainStateActor", "_AutoscalingCoordinatorActor", "PlacementGroupCleaner")
    actors = [a for a in rows if a.class_name.rpartition(".")[2] not in kept]
    groups: list[Any] = [*list_placement_groups(filters=[("state", "!=", "REMOVED")])]
    found = {a.actor_id: f"{a.class_name} {a.state}" for a in actors}
    found |= {g.placement_group_id: f"placement group {g.state}" for g in groups}
    return {key: what for key, what in found.items() if key not in before}


def test_a_busy_cluster_is_named_and_ctrl_c_acts(held, smoke_none, digits, tmp_path):
    output = tmp_path / "output"
    argv = ["train", "smoke", "--method", "none", "--data", str(digits), "--storage", str(tmp_path), "--name", "run"]
    before = set(left_behind())  # by runs of other tests, whose job lives as long as this process
    driver = start(held, output, *argv, "--supervised.batch", "60", "--compute.workers", "2")
    try:
        says = r"waiting for 2 CPUs; the cluster has 2, 0 free \(held by 1 \S*Holder of job \w+\)"
        # said again every minute, without the holders where Ray is too slow to name them
        wait_for(lambda: driver.poll() is not None or re.search(says, output.read_text()))
        assert driver.poll() is None, output.read_text()
        wait_for(lambda: len(left_behind(before)) > 0)  # Ray Train's controller, and what it waits for
        driver.send_signal(signal.SIGINT)
        asked = time.monotonic()
        assert driver.wait(60) == 130, output.read_text()
        ended_s = time.monotonic() - asked
        while (left := left_behind(before)) and time.monotonic() - asked < ENDED_S:
            time.sleep(0.2)
        assert left == {}
        print(f"ended {ended_s:.1f} s after SIGINT, nothing was left after {time.monotonic() - asked:.1f} s")
        assert ended_s < ENDED_S
    finally:
        driver.kill()
    assert "stopped while waiting for 2 CPUs (SIGINT)" in output.read_text()
    assert "Traceback" not in output.read_text()


def test_waiting_has_a_limit(held, digits, tmp_path):
    output = tmp_path / "output"
    argv = ["train", "smoke", "--method", "none", "--data", str(digits), "--storage", str(tmp_path), "--name", "run"]
    driver = start(held, output, *argv, "--supervised.batch", "60", "--wait-s", "3")
    assert driver.wait(WAIT_S) == 1, output.read_text()
    said = re.search(r"no workers after (\d+) s of waiting for", output.read_text())
    assert said is not None, output.read_text()
    assert int(said[1]) >= 3


def test_a_stopped_job_that_is_submitted_again_ends_with_the_same_weights(ray_here, digits, tmp_path, capfd):
    """Through `dbd submit`, and as an undisturbed run without Ray."""
    from ray._private import worker
    from ray.job_submission import JobSubmissionClient

    address = f"http://{worker._global_node.address_info['webui_url']}"  # type: ignore[union-attr]
    python = ["--address", address, "--python", sys.executable]

    def command(name: str) -> list[str]:
        method = ["--method", "none", "--supervised.batch", "60", "--supervised.epochs", "60"]
        method += ["--compute.workers", "1", "--compute.threads", "1"]
        storage = str(tmp_path / name)  # one each: a run takes the stages that another has left in its storage
        return ["train", "smoke", *method, "--data", str(digits), "--storage", storage, "--name", "run"]

    client = JobSubmissionClient(address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", address)
        from dbd_dist.cli import main

        assert main([*command("undisturbed"), "--launcher", "local"]) == 0
        assert main(["submit", *python, "--detach", "--", *command("stopped")]) == 0
        job_id = re.findall(r"job (raysubmit_\w+)", capfd.readouterr().err)[-1]
        rows = tmp_path / "stopped" / "run" / "metrics.jsonl"
        wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3)
        client.stop_job(job_id)
        wait_for(lambda: client.get_job_status(job_id) == "STOPPED")
        assert not (tmp_path / "stopped" / "run" / "result.json").exists()
        assert main(["submit", *python, "--", *command("stopped")]) == 0
    runs = [tmp_path / name / "run" for name in ("undisturbed", "stopped")]
    assert len({sha256_file(run / "model.safetensors") for run in runs}) == 1
    with pytest.raises(Exception, match="there is no job"):
        jobs.follow_job(address, "raysubmit_none")
