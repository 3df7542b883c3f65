"""What a run on a busy cluster says, and when. No Ray is started; on a real one in test_ray_busy.py."""

from __future__ import annotations

import io

import pytest

from cluster import waiting
from cluster.waiting import StillWaiting, Waiting, fitting


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def busy(monkeypatch):
    """A cluster of two CPUs, none of them free."""
    monkeypatch.setattr(waiting, "free_by_node", lambda: [{"CPU": 0.0}])
    monkeypatch.setattr(waiting, "total_by_node", lambda: [{"CPU": 2.0}])
    monkeypatch.setattr(waiting, "holders", lambda: ["2 Holder of job 02000000"])


def test_it_is_said_within_ten_seconds_and_every_minute(busy):
    clock, said, started = Clock(), io.StringIO(), []
    wait = Waiting(2, {"CPU": 1.0}, lambda: bool(started), stream=said, clock=clock)
    times = []
    for _ in range(140):
        before = len(said.getvalue())
        assert wait.poll()
        if len(said.getvalue()) > before:
            times.append(clock.now - 100)
        clock.now += 1
    assert times == [5, 65, 125]
    line = "waiting for 2 CPUs; the cluster has 2, 0 free (held by 2 Holder of job 02000000)"
    assert said.getvalue().splitlines() == [line] * 3
    started.append(True)
    assert not wait.poll()
    assert not wait.poll()
    started.clear()  # lost, and to be started again
    clock.now += 100
    assert wait.poll()
    assert len(said.getvalue().splitlines()) == 3
    clock.now += 5
    assert wait.poll()
    assert said.getvalue().splitlines() == [line] * 4


def test_the_limit_counts_anew_for_workers_that_were_lost(busy):
    clock, started = Clock(), [True]
    wait = Waiting(2, {"CPU": 1.0}, lambda: bool(started), limit_s=20, quiet=True, clock=clock)
    assert not wait.poll()
    clock.now += 100
    started.clear()
    assert wait.poll()
    clock.now += 20
    with pytest.raises(StillWaiting, match="no workers after 20 s"):
        wait.poll()


def test_nothing_is_said_where_there_is_room(busy, monkeypatch):
    monkeypatch.setattr(waiting, "free_by_node", lambda: [{"CPU": 1.0}, {"CPU": 1.0}])
    clock, said = Clock(), io.StringIO()
    wait = Waiting(2, {"CPU": 1.0}, lambda: False, stream=said, clock=clock)
    clock.now += 30
    assert wait.poll()
    assert said.getvalue() == ""


def test_the_limit(busy):
    clock = Clock()
    wait = Waiting(2, {"CPU": 1.0}, lambda: False, limit_s=20, quiet=True, clock=clock)
    clock.now += 19
    assert wait.poll()
    clock.now += 1
    with pytest.raises(StillWaiting, match="no workers after 20 s of waiting for 2 CPUs") as caught:
        wait.poll()
    assert caught.value.exit_code == 1


def test_room_on_no_single_node(busy, monkeypatch):
    monkeypatch.setattr(waiting, "free_by_node", lambda: [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0}])
    monkeypatch.setattr(waiting, "total_by_node", lambda: [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}])
    monkeypatch.setattr(waiting, "holders", list)
    clock, said = Clock(), io.StringIO()
    wait = Waiting(1, {"CPU": 3.0, "GPU": 1.0}, lambda: False, stream=said, clock=clock)
    clock.now += 6
    assert wait.poll()
    assert said.getvalue() == (
        "waiting for 3 CPUs and 1 GPU; the cluster has 8 CPUs, 4 free; 1 GPUs, 1 free; "
        "no node has room for 3 CPUs and 1 GPU of one worker\n"
    )


@pytest.mark.parametrize(
    ("free", "each", "count"),
    [
        ([{"CPU": 3.0}, {"CPU": 1.0}], {"CPU": 2.0}, 1),
        ([{"CPU": 4.0, "GPU": 1.0}], {"CPU": 1.0, "GPU": 0.5}, 2),
        ([{"CPU": 4.0}], {"CPU": 1.0, "GPU": 1.0}, 0),
        ([{"CPU": 1.8}], {"CPU": 0.9}, 2),
        ([], {"CPU": 1.0}, 0),
    ],
)
def test_fitting(free, each, count):
    assert fitting(free, each) == count
