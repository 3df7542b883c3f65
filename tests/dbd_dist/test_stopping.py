"""Requests to stop that no worker is there to see."""

from __future__ import annotations

import time

import pytest

from cluster.waiting import StillWaiting, Waiting
from dbd_dist.launch import ray_train
from dbd_dist.runtime.stopping import Stopped, StopRequest


def test_a_request_that_no_worker_sees_ends_the_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_train, "WORKERS_HEED_S", 0.0)
    request = StopRequest(tmp_path / "stop")
    started = tmp_path / "started"
    wait = Waiting(2, {"CPU": 1.0}, started.exists, quiet=True)
    ray_train._begun(wait, request, tmp_path)  # nobody asked
    request.forward("SIGINT")
    with pytest.raises(Stopped, match=r"stopped while waiting for 2 CPUs \(SIGINT\)") as caught:
        ray_train._begun(wait, request, tmp_path)
    assert caught.value.exit_code == 130
    started.touch()
    ray_train._begun(wait, request, tmp_path)  # the workers are there and will heed it
    request.clear()
    assert request.forwarded is None


def test_the_wait_ends(tmp_path):
    wait = Waiting(2, {"CPU": 1.0}, lambda: False, limit_s=0.0, quiet=True)
    with pytest.raises(StillWaiting):
        ray_train._begun(wait, StopRequest(tmp_path / "stop"), tmp_path)


def test_what_happens_between_polls_ends_the_wait_for_fit():
    def between() -> None:
        raise StillWaiting("x")

    class Watch:
        def lost(self) -> None:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_train.session, "Watch", Watch)
        with pytest.raises(StillWaiting):
            ray_train._wait_for(lambda: time.sleep(3), between)
