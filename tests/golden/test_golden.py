"""What the commands make today is what they made when the golden values were written (see make.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.golden import make


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where data sets and runs go; shared, so that nothing is made twice."""
    return tmp_path_factory.mktemp("golden")


@pytest.fixture(scope="module")
def seed_0(work) -> dict[str, Any]:
    """The runs of one process, seed 0."""
    return make.make_runs(work, "local", seeds=[0])


@pytest.fixture(autouse=True)
def apart(monkeypatch) -> None:
    """Whatever the user has set."""
    for name, value in make.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DBD_STORAGE", raising=False)


def agrees(part: str, found: dict[str, Any]) -> None:
    problems = make.differences(part, found)
    assert not problems, "\n".join(problems[:40])


def here_only(part: str) -> None:
    if not make.same_machine(part):
        pytest.skip("made on another processor or with another torch")


@pytest.mark.slow
def test_data_sets_of_every_attack(work):
    agrees("prepare", make.make_prepare(work))


@pytest.mark.slow
def test_one_process(seed_0):
    agrees("local", seed_0)


@pytest.mark.slow
def test_report_of_one_seed(work, seed_0):
    here_only("report")
    agrees("report", make.make_report(work, seeds=[0]))


@pytest.mark.slow
def test_one_process_and_report_of_another_seed(work, seed_0):
    agrees("local", make.make_runs(work, "local", seeds=[1]))
    here_only("report")
    agrees("report", make.make_report(work))


@pytest.mark.slow
def test_two_ranks_of_torchrun_seed_0(work):
    """`make golden` has the other seed, and runs on Ray, which are held against torchrun's in test_launch.py."""
    agrees("torchrun", make.make_runs(work, "torchrun", seeds=[0], methods=["dbd"]))


@pytest.mark.slow
def test_artefacts_and_what_they_poison(work):
    here_only("craft")
    agrees("craft", make.make_craft(work))


@pytest.mark.slow
def test_a_change_is_found(seed_0):
    """What compares the values sees the last bit of a loss, a hash, and what is missing."""
    here_only("local")
    run = seed_0["dbd-s0"]
    *rows, last = run["rows"]

    def found(**changes: Any) -> list[str]:
        return make.differences("local", {"dbd-s0": run | changes})

    assert found() == []
    (line,) = found(rows=[*rows, last | {"loss": math.nextafter(last["loss"], 0)}])
    assert line.startswith(f"local: dbd-s0: rows[{len(rows)}]: loss: ")
    assert len(found(rows=rows)) == 1
    assert len(found(weights={"model": run["weights"]["model"]})) == 1
    assert len(found(weights=run["weights"] | {"model": "0" * 64})) == 1
    assert make.differences("local", {"dbd-s7": run}) == ["local: there is no golden value for dbd-s7"]


def test_times_and_hardware_are_no_part_of_a_table():
    text = "| data set | time | n |\n|---|---:|---:|\n| a \\| b | 3 s ± 1 s | 2 |\n\nMean.\n\nHardware: this one."
    assert make.table(text) == ["| data set | n |", "|---|---:|", "| a \\| b | 2 |", "Mean."]
