"""Leases on stages: one trains, others wait for it, and take over from the dead."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dbd_dist.config import override
from dbd_dist.distributed.world import World
from dbd_dist.launch.local import run_local
from dbd_dist.runtime import lease
from dbd_dist.runtime.stopping import Stopped

HOLD = """
import sys
from pathlib import Path
from dbd_dist.distributed.world import World
from dbd_dist.runtime import lease
with lease.held(Path(sys.argv[1]), holder="the other", world=World(), finished=lambda: False) as mine:
    assert mine
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", 0.02)


def take(path: Path, finished=lambda: False, between=lambda other: None):
    return lease.held(path, holder="me", world=World(), finished=finished, between=between)


def test_a_free_lease_is_taken_and_leaves_nothing(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE
    with take(path) as mine:
        assert mine
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_was_stored_stays(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE
    with take(path):
        (path.parent / "state.pt").write_text("weights")
    assert [p.name for p in path.parent.iterdir()] == ["state.pt"]
    with take(path, finished=lambda: True) as mine:
        assert not mine
    assert not path.exists()


def test_a_failure_gives_it_up(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE
    with pytest.raises(RuntimeError), take(path):
        raise RuntimeError("diverged")
    with take(path) as mine:
        assert mine


def test_others_wait_until_the_stage_is_there(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE
    stored, said, got = threading.Event(), [], []

    def wait() -> None:
        with take(path, finished=stored.is_set, between=said.append) as mine:
            got.append(mine)

    with take(path) as mine:
        assert mine
        waiting = threading.Thread(target=wait)
        waiting.start()
        while not said:
            time.sleep(0.01)
        assert got == []
        stored.set()
    waiting.join(10)
    assert got == [False]
    assert said[0] == "me"


def test_a_wait_can_be_ended(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE

    def stop(other: str) -> None:
        raise Stopped("stopped", exit_code=130)

    with take(path):
        with pytest.raises(Stopped), take(path, between=stop):
            pytest.fail("it is held")
        assert path.exists()


@pytest.mark.slow
def test_the_dead_give_it_up(tmp_path):
    path = tmp_path / "simclr-key" / lease.FILE
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        seen: list[str] = []

        def kill(other: str) -> None:
            seen.append(other)
            holder.kill()

        with take(path, between=kill) as mine:
            assert mine
        assert seen[0] == "the other"
    finally:
        with suppress(ProcessLookupError):
            holder.kill()
        holder.wait()


@pytest.mark.slow
def test_runs_that_share_stages_train_each_once(smoke_config, tmp_path):
    """Two weights of the loss, three fractions: one pretraining, two warm-ups, six fine-tunings."""
    base = override(smoke_config, {"simclr.epochs": 1, "warmup.epochs": 1, "mixmatch.epochs": 1, "mixmatch.steps": 1})
    trained: dict[str, int] = {"simclr": 0, "warmup": 0, "mixmatch": 0}
    for alpha in (0.1, 0.5):
        for keep in (0.4, 0.5, 0.6):
            config = override(base, {"warmup.sce_alpha": alpha, "split.keep": keep})
            result = run_local(config, storage=tmp_path, name=f"a{alpha}-k{keep}", quiet=True)
            assert result is not None
            for stage in trained:
                trained[stage] += stage not in result["reused_stages"]
    assert trained == {"simclr": 1, "warmup": 2, "mixmatch": 6}
    assert list((tmp_path / "stages").glob("*/.lease")) == []


def test_a_run_waits_for_the_one_that_trains_its_stage(smoke_config, tmp_path, monkeypatch):
    """The second starts while the first pretrains, and finds it at work."""
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    slow = override(smoke_config, {"simclr.epochs": 3, "warmup.epochs": 1, "mixmatch.epochs": 1, "mixmatch.steps": 1})
    other = replace(slow, method=replace(slow.method, split=replace(slow.method.split, keep=0.6)))
    results, began = {}, threading.Event()

    def run(name: str, config, hook) -> None:
        results[name] = run_local(config, storage=tmp_path, name=name, quiet=True, hook=hook)

    log = tmp_path / "second" / "logs" / "rank0.jsonl"

    def pause(row, checkpoint) -> None:
        began.set()
        deadline = time.monotonic() + 60
        while not (log.exists() and "waits for a stage" in log.read_text()):
            assert time.monotonic() < deadline, "the second run does not wait"
            time.sleep(0.02)

    first = threading.Thread(target=run, args=("first", slow, pause))
    first.start()
    assert began.wait(60)
    run("second", other, lambda row, checkpoint: None)
    first.join(120)
    assert "simclr" not in results["first"]["reused_stages"]
    assert results["second"]["reused_stages"][0] == "simclr"
    warmups = ["warmup" in results[name]["reused_stages"] for name in results]
    assert sorted(warmups) == [False, True]  # either may be there first
    assert "waited for a stage" in log.read_text()
