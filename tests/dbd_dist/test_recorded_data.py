"""A run is measured and repeated on its own data set, or says that it is another: folders move, others take their
names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.attacks import NoAttack
from data_prep.config import PrepareConfig
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist.cli import main
from dbd_dist.launch.local import run_local
from dbd_dist.reporting.data import Data, find_data
from dbd_dist.reporting.runs import load_run

OTHER = "holds other data ("


@pytest.fixture(scope="module")
def made(digits, smoke_none, tmp_path_factory) -> Path:
    """Two folders, a and b, each with a data set called ds; a/runs/r was trained on the one of a. Not to be changed."""
    root = tmp_path_factory.mktemp("recorded")
    (root / "a").mkdir()
    (root / "a" / "ds").symlink_to(digits)
    config = PrepareConfig(
        source=Digits(train_per_class=24, test_per_class=5), attack=NoAttack(), out=root / "b" / "ds", workers=1
    )
    prepare(config, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "a")
        run_local(replace(smoke_none, data=Path("ds")), storage=Path("runs"), name="r", quiet=True)
    return root


@pytest.fixture
def moved(made, tmp_path, monkeypatch, edit_json) -> Path:
    """A copy whose run names its data by a relative path, as early versions did; the current folder is b."""
    root = Path(shutil.copytree(made, tmp_path / "copy", symlinks=True))
    path = root / "a" / "runs" / "r" / "run.json"
    edit_json(path, config=json.loads(path.read_text())["config"] | {"data": "ds"})
    monkeypatch.chdir(root / "b")
    return root


COMMANDS = {
    "evaluate": ["evaluate", "../a/runs/r"],
    "train": ["train", "--config", "../a/runs/r/run.json", "--launcher", "local", "--storage", "new"],
}


@pytest.fixture
def trained(monkeypatch) -> list[Path]:
    """The data sets of runs that would have been trained."""
    found: list[Path] = []
    monkeypatch.setattr("dbd_dist.launch.start.launch", lambda config, *_, **__: found.append(config.data))
    return found


def test_the_path_is_kept_whole(made):
    stored = json.loads((made / "a" / "runs" / "r" / "run.json").read_text())
    assert stored["config"]["data"] == str(made / "a" / "ds")


@pytest.mark.parametrize("command", COMMANDS)
def test_from_another_folder_it_is_the_same(command, made, monkeypatch, capsys, trained, tmp_path):
    expected = json.loads((made / "a" / "runs" / "r" / "result.json").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds").symlink_to(made / "b" / "ds")
    (tmp_path / "a").symlink_to(made / "a")
    argv = [word.replace("../a", "a") for word in COMMANDS[command]]
    assert main(argv) == 0
    if command == "evaluate":
        assert json.loads(capsys.readouterr().out)["asr"] == expected["asr"]
    else:
        assert trained == [made / "a" / "ds"]


@pytest.mark.parametrize("command", COMMANDS)
def test_another_data_set_of_that_name_is_refused(command, moved, capsys, trained):
    assert main(COMMANDS[command]) == 2
    said = capsys.readouterr().err
    assert OTHER in said
    assert "--data" in said
    assert trained == []
    assert not Path("new").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_none_of_that_name_is_one_message(command, moved, capsys, trained):
    shutil.rmtree("ds")
    assert main(COMMANDS[command]) == 2
    said = capsys.readouterr().err
    assert "not a dataset folder" in said
    assert "--data" in said
    assert trained == []


@pytest.mark.parametrize("command", COMMANDS)
def test_whoever_names_a_data_set_gets_it(command, moved, capsys, trained):
    assert main([*COMMANDS[command], "--data", "../a/ds"]) == 0
    if command == "train":
        assert trained == [moved / "a" / "ds"] or trained == [moved / "b" / ".." / "a" / "ds"]


def test_a_report_looks_on_where_another_has_its_name(moved):
    run = load_run(moved / "a" / "runs" / "r")
    assert find_data(run) == "the data set's folder holds other data than the run was trained on"
    own = moved / "a" / "runs" / "datasets" / Path(run.dataset).name
    own.parent.mkdir()
    own.symlink_to(moved / "a" / "ds")
    found = find_data(run)
    assert isinstance(found, Data)
    assert found.folder == own
