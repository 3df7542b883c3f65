"""From a table to commands: order, shared stages, costs; nothing is trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.dataset.manifest import read_manifest
from data_prep.errors import UserError
from dbd_dist.cli import main
from dbd_dist.reproduce import collect, cost
from dbd_dist.reproduce.grid import Place, plan
from dbd_dist.reproduce.table import Variant, find_table, narrowed


@pytest.fixture
def table():
    return narrowed(
        find_table("main", preset_name="smoke"),
        attacks=["badnets", "label-consistent"],
        methods=["none", "dbd"],
        seeds=[0, 1],
    )


def test_every_task_comes_after_what_it_needs(table, tmp_path):
    whole = plan(table, Place(storage=tmp_path))
    before: set[str] = set()
    for task in whole.tasks:
        assert set(task.needs) <= before
        before.add(task.name)
    kinds = [task.argv[0] for task in whole.tasks]
    assert kinds.count("train") == len(whole.cells) == 8
    assert kinds.count("craft") == 2  # of label-consistent, one a seed
    assert kinds.count("prepare") == 5  # two attacks on two seeds, and the clean one that both artefacts are made on
    assert all("--holdout-clean" in task.argv for task in whole.tasks if task.argv[0] == "prepare")


def test_what_a_stage_shares_is_trained_by_the_first_run_alone(table, tmp_path):
    keep = Variant(name="keep", method="dbd", flags=("--split.keep", "0.3"))
    head = Variant(name="head", method="dbd", flags=("--warmup.lr", "0.1"))
    wanted = replace(table, variants=(*table.variants, keep, head), cases=table.cases[:1], seeds=(0,))
    cells = {cell.variant.name: cell for cell in plan(wanted, Place(storage=tmp_path)).cells}
    assert cells["none"].train == ("supervised",)
    assert cells["dbd"].train == ("simclr", "warmup", "mixmatch")
    assert cells["keep"].train == ("mixmatch",)
    assert cells["head"].train == ("warmup", "mixmatch")
    first = str(cells["dbd"].folder)
    assert [cells[name].task.after for name in ("none", "dbd", "keep", "head")] == [(), (), (first,), (first,)]


def test_a_run_that_is_finished_with_other_settings_is_refused(table, tmp_path):
    cell = plan(table, Place(storage=tmp_path)).cells[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "result.json").write_text("{}")
    config = cell.config.to_dict()
    (cell.folder / "run.json").write_text(json.dumps({"config": config, "data_hash": "a"}))
    assert plan(table, Place(storage=tmp_path)).cells[0].task.done
    stage = cell.config.method.stages()[0].name
    config[stage]["batch"] = config[stage]["batch"] // 2
    (cell.folder / "run.json").write_text(json.dumps({"config": config, "data_hash": "a"}))
    with pytest.raises(UserError, match="with other settings than the table's"):
        plan(table, Place(storage=tmp_path))


def test_a_run_that_is_finished_on_other_images_is_refused(table, tmp_path, digits):
    """An artefact that was crafted anew poisons other pixels, in a folder of the same name."""
    cell = plan(table, Place(storage=tmp_path)).cells[0]
    shutil.copytree(digits, cell.task.needs[0])
    cell.folder.mkdir(parents=True)
    (cell.folder / "result.json").write_text("{}")
    run = {"config": cell.config.to_dict(), "data_hash": read_manifest(digits).data_hash}
    (cell.folder / "run.json").write_text(json.dumps(run))
    assert plan(table, Place(storage=tmp_path)).cells[0].task.done
    (cell.folder / "run.json").write_text(json.dumps(run | {"data_hash": "b"}))
    with pytest.raises(UserError, match="finished, on other images"):
        plan(table, Place(storage=tmp_path))


@pytest.mark.parametrize("threads", [3, None])
def test_a_cells_command_has_the_threads_that_its_run_had(threads, table, tmp_path):
    cell = plan(table, Place(storage=tmp_path, threads=2)).cells[0]
    config = cell.config.to_dict()
    config["compute"]["threads"] = threads
    cell.folder.mkdir(parents=True)
    (cell.folder / "run.json").write_text(json.dumps({"config": config, "data_hash": "a"}))
    (cell.folder / "result.json").write_text(json.dumps({"method": "none", "dataset": "d", "clean_acc": 0.5}))
    (cell.folder / "metrics.jsonl").touch()
    collect.write_results(plan(table, Place(storage=tmp_path, threads=2)), tmp_path / "out", "dbd reproduce")
    [written] = (tmp_path / "out" / collect.RESULTS).iterdir()
    command = json.loads(written.read_text())["commands"][-1]
    assert ("--compute.threads" in command) == (threads is not None)
    assert threads is None or f"--launcher local --compute.threads {threads}" in command


def test_clean_images_are_needed_and_none_are_set_aside(table, tmp_path, monkeypatch):
    from dbd_dist.methods import NoDefense

    monkeypatch.setattr(NoDefense, "needs_clean", True)
    plan(table, Place(storage=tmp_path))
    with pytest.raises(UserError, match="needs clean images, and the table sets none aside"):
        plan(replace(table, holdout_clean=None), Place(storage=tmp_path))


def finished(folder: Path, preset: str, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"preset": preset, "method": "none"}}))
    (folder / "result.json").write_text(json.dumps({"method": "none", "dataset": "d", "clean_acc": 0.5}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_cost_against_numbers_worked_out_by_hand(table, tmp_path):
    def row(stage: str, rate: float, time_s: float, **more: object) -> dict:
        return {"stage": stage, "epoch": 1, "images_per_s": rate, "time_s": time_s, **more}

    finished(
        tmp_path / "other", "smoke", [row("supervised", 100, 10), row("supervised", 200, 5), row("supervised", 300, 4)]
    )
    finished(tmp_path / "reused", "smoke", [row("simclr", 1, 1, reused=True)])
    finished(tmp_path / "elsewhere", "demo", [row("mixmatch", 1, 1)])
    whole = plan(table, Place(storage=tmp_path))
    known = cost.speeds(cost.finished_runs(tmp_path, "smoke"))
    assert known == {"supervised": cost.Speed(epoch_s=5, whole_s=19)}
    found = cost.cost(whole.cells, known)
    assert found.seconds == 4 * 2 * 1000 / 200  # four runs of two epochs
    assert found.unknown == ("dbd: simclr", "dbd: warmup", "dbd: mixmatch")


def test_a_stage_that_counts_no_images_costs_what_it_took(tmp_path):
    inversion = {"stage": "inversion", "epoch": 1, "epochs": 1, "time_s": 50.0, "flagged_classes": 0}
    for number, time_s in enumerate((50.0, 60.0, 80.0)):
        finished(tmp_path / str(number), "smoke", [{**inversion, "time_s": time_s}])
    assert cost.speeds(cost.finished_runs(tmp_path, "smoke")) == {"inversion": cost.Speed(epoch_s=60, whole_s=60)}
    whole = plan(narrowed(find_table("main", preset_name="smoke"), attacks=["badnets"], methods=["nc"], seeds=[0]),
                 Place(storage=tmp_path))  # fmt: skip
    found = cost.cost(whole.cells, cost.speeds(cost.finished_runs(tmp_path, "smoke")))
    assert found.seconds == 60
    assert "nc: inversion" not in found.unknown


def test_runs_on_the_same_images_tell_more_than_others(table, tmp_path):
    whole = plan(table, Place(storage=tmp_path))
    row = {"stage": "supervised", "epoch": 1, "images_per_s": 100, "time_s": 10}
    finished(tmp_path / "larger-images", "smoke", [{**row, "time_s": 1000}])
    finished(whole.cells[0].folder, "smoke", [row])
    known = cost.speeds(cost.finished_runs(tmp_path, "smoke", whole.data))
    assert known == {"supervised": cost.Speed(epoch_s=10, whole_s=10)}


def test_dry_run_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["main", "--preset", "smoke", "--attacks", "badnets", "--methods", "none", "dbd", "--seeds", "0"]
    assert main(["reproduce", *argv, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "2 runs, 0 of them finished" in out
    assert "not known: no run of this preset has finished" in out
    assert [line.split()[:4] for line in out.splitlines()[-2:]] == [
        ["badnets", "none", "0", "missing"],
        ["badnets", "dbd", "0", "missing"],
    ]
    assert list(tmp_path.iterdir()) == []
