"""Labels outside the classes, in a folder whose hashes were all made to fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.cli import main
from tests.fuzz.mutate import change_label


@pytest.fixture
def relabelled(digits_copy):
    """Gives a function that changes the label of one sample, and every hash with it."""

    def change(split: str, sample: int, label: int) -> Path:
        change_label(digits_copy, split, sample, label)
        return digits_copy

    return change


@pytest.mark.parametrize("split", ["train", "test", "test_triggered"])
@pytest.mark.parametrize("label", [99, 10, -1, 2**40, -(2**63), 2**63 - 1])
def test_a_label_of_no_class_is_found_at_opening(split, label, relabelled):
    folder = relabelled(split, 7, label)
    with pytest.raises(UserError, match=f"{split}.beton, sample 7: label {label} is not a class, 0 to 9"):
        open_dataset(folder)


def test_any_class_is_a_label(relabelled):
    open_dataset(relabelled("train", 7, 9))


@pytest.mark.parametrize("line", ["train smoke --launcher local --data", "doctor", "bench --data", "tune sce --data"])
def test_every_command_says_so(line, relabelled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*line.split(), str(relabelled("train", 0, 99))]) == 2
    said = capsys.readouterr().err
    assert said.count("label 99 is not a class") == 1
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/run.json"))
