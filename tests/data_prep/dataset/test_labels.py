"""Labels outside the classes, in a folder whose hashes were all made to fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.beton import read_beton
from data_prep.beton.format import FIELD, FIELDS, HEADER, SAMPLE
from data_prep.dataset.manifest import open_dataset, read_manifest, record_files
from data_prep.errors import UserError
from data_prep.io.hashes import content_hash, data_hash
from dbd_dist.cli import main


@pytest.fixture
def relabelled(digits_copy, edit_sealed):
    """Gives a function that changes the label of one sample, and every hash with it."""

    def change(split: str, sample: int, label: int) -> Path:
        path = digits_copy / f"{split}.beton"
        content = bytearray(path.read_bytes())
        table = np.frombuffer(
            content, dtype=SAMPLE, count=sample + 1, offset=HEADER.itemsize + len(FIELDS) * FIELD.itemsize
        )
        table["label"][sample] = label
        del table
        path.write_bytes(content)
        images, labels, _ = read_beton(path)
        hashes = dict(read_manifest(digits_copy).content_hash) | {split: content_hash(images, labels)}
        files = {name: vars(record) for name, record in record_files(digits_copy).items()}
        edit_sealed(digits_copy / "manifest.json", content_hash=hashes, data_hash=data_hash(hashes), files=files)
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
