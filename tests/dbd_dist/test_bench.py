"""The benchmarks run and say what they should; how fast anything is, is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_prep.dataset.manifest import open_dataset
from dbd_dist.bench import floor, run, timing
from dbd_dist.bench.row import Row, Setup, ratio, table
from dbd_dist.cli import main

CPU = torch.device("cpu")


@pytest.fixture
def setup(digits: Path, tmp_path: Path) -> Setup:
    return Setup(dataset=open_dataset(digits), scratch=tmp_path, device=CPU, repeats=1, quick=True)


def test_rounds_take_all_works_in_turn_and_leave_out_the_warm_up():
    calls: list[str] = []
    clock = iter(range(100))
    times = timing.rounds(
        {name: lambda name=name: calls.append(name) for name in "ab"},
        repeats=3, device=CPU, clock=lambda: float(next(clock)), warm_up=2,
    )  # fmt: skip
    assert calls == ["a", "b"] * 5
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_flops_of_a_product_and_of_its_backward_pass():
    a = torch.randn(3, 4, requires_grad=True)
    b = torch.randn(4, 5, requires_grad=True)
    assert floor.flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert floor.flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 4 * 5


def test_ratio_is_taken_within_rounds():
    assert ratio([10.0, 20.0, 90.0], [5.0, 10.0, 30.0]) == 2.0


def test_table_shows_floor_and_ratio():
    row = Row(
        bench="b", name="ours", unit="ms", values=[3.0, 1.0, 2.0], floor=0.5, reference="theirs", ratio=4.0,
        notes={"mfu": 0.25, "kind": "text"},
    )  # fmt: skip
    assert table([row]).splitlines()[-1] == "| b | ours (mfu 0.25) | 2 | 1 - 3 | 3 | ms | 0.5 | 4.00 | 4.00 (theirs) |"
    assert row.as_json() | {"median": 2.0, "least": 1.0, "most": 3.0, "n": 3, "kind": "text"} == row.as_json()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simclr", "mixmatch", "split"])
def test_steps_report_a_floor(setup, name):
    rows = run.run([name], setup, lambda row: None)
    assert {row.bench for row in rows} == {name}
    assert all(row.floor and row.floor > 0 for row in rows if row.unit != "fraction")


@pytest.mark.slow
def test_command_writes_what_it_shows(digits, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "--quick", "--only", "loader", "--data", str(digits), "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {row["bench"] for row in found["rows"]} == {"loader"}
    assert len(found["rows"]) == 6
    assert all(row["name"] in shown and row["median"] > 0 for row in found["rows"])
    assert {"host", "versions", "commit", "command", "device"} <= found.keys()


@pytest.mark.slow
def test_jpeg_is_measured_beside_raw_and_beside_files(setup):
    rows = run.run(["jpeg"], setup, lambda row: None)
    assert len(rows) == 8
    sizes = {row.name.split("px, ")[1]: row.notes["bytes_an_image"] for row in rows if row.notes}
    assert sizes["FFCV stream, raw"] == 224 * 224 * 3
    stored, files = sizes["FFCV stream, JPEG"], sizes["DataLoader, Pillow, JPEG files"]
    assert stored == pytest.approx(files, rel=0.05)  # of half as many images
    assert stored < 224 * 224 * 3 / 2
    for group in {row.name.split(",")[0] for row in rows}:
        (jpeg,) = [row for row in rows if row.name == f"{group}, 224 px, FFCV stream, JPEG"]
        assert jpeg.reference == "DataLoader, Pillow, JPEG files"
        assert jpeg.ratio is not None
        assert jpeg.ratio > 0


def test_command_knows_every_benchmark():
    from typing import get_args

    from dbd_dist.commands.bench import Name

    assert set(get_args(Name)) == set(run.BENCHMARKS)


def test_mistakes_are_refused(capsys, tmp_path):
    assert main(["bench", "--repeats", "0"]) == 2
    assert "--repeats" in capsys.readouterr().err
    assert main(["bench", "--data", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert main(["bench", "--device", "cuda"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["augmentation", "encode", "epoch", "memory"])
def test_the_others_run(setup, name):
    assert run.run([name], setup, lambda row: None)
