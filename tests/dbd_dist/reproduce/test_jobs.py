"""Commands in order: what needs what, what a failure leaves out, and what a request to stop does."""

from __future__ import annotations

from pathlib import Path

import pytest

from dbd_dist.reproduce import jobs
from dbd_dist.reproduce.grid import Task
from dbd_dist.runtime.stopping import Stopped


@pytest.fixture
def task(tmp_path):
    def make(name: str, *needs: str, argv: tuple[str, ...] = ()) -> Task:
        return Task(name=name, argv=argv or (name,), done=False, needs=needs, log=tmp_path / f"{name}.log")

    return make


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Commands that were run; those called fail* fail, stop* were stopped."""
    names: list[str] = []

    def main(argv: list[str]) -> int:
        names.append(argv[0])
        print(f"output of {argv[0]}")
        if argv[0] == "exit":
            raise SystemExit(2)
        if argv[0] == "raise":
            raise RuntimeError("no")
        return 2 if argv[0].startswith("fail") else 143 if argv[0].startswith("stop") else 0

    monkeypatch.setattr(jobs, "main", main)
    return names


def test_a_failure_leaves_out_what_needs_it_and_nothing_else(task, called):
    reported = []
    tasks = [task("fail"), task("b", "fail"), task("c", "b"), task("d"), task("exit"), task("raise")]
    codes = jobs.run_tasks(tasks, jobs=1, report=lambda done, code: reported.append((done.name, code)))
    assert codes == {"fail": 2, "b": jobs.SKIPPED, "c": jobs.SKIPPED, "d": 0, "exit": 2, "raise": 1}
    assert called == ["fail", "d", "exit", "raise"]
    assert dict(reported) == codes


def test_output_goes_to_the_log(task, called, capsys):
    one = task("d")
    jobs.run_tasks([one], jobs=1)
    jobs.run_tasks([one], jobs=1)  # appended: the first start of a resumed run tells most
    assert one.log.read_text() == 2 * "$ dbd d\noutput of d\n"
    assert capsys.readouterr().out == ""


def test_a_run_that_was_stopped_stops_the_table(task, called):
    with pytest.raises(Stopped) as stopped:
        jobs.run_tasks([task("d"), task("stop"), task("e")], jobs=1)
    assert stopped.value.exit_code == 143
    assert called == ["d", "stop"]


@pytest.mark.slow
def test_several_at_a_time_keep_the_order_of_what_they_need(task, tmp_path):
    """Processes of their own; a clean data set, one that needs another's failure, and one that waits for it."""
    folder = tmp_path / "data"
    made = ("prepare", "digits", "clean", "--train-per-class", "5", "--test-per-class", "2", "--out", str(folder))
    tasks = [
        task("data", argv=made),
        task("check", "data", argv=("doctor", str(folder))),
        task("bad", argv=("train", "no-such-preset")),
        task("worse", "bad", argv=("doctor",)),
    ]
    codes = jobs.run_tasks(tasks, jobs=2)
    assert codes == {"data": 0, "check": 0, "bad": 2, "worse": jobs.SKIPPED}
    assert "there is no preset" in (tmp_path / "bad.log").read_text()
    assert not Path(tmp_path / "worse.log").exists()
