"""Copies of dataset folders on a node's own disk."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_prep.dataset import staging
from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.staging import stage
from data_prep.errors import UserError
from data_prep.io.atomic import temporary


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def copies(monkeypatch) -> list[Path]:
    """The files that were copied, in order."""
    made: list[Path] = []
    copy = staging._copy
    monkeypatch.setattr(staging, "_copy", lambda source, target: (made.append(source), copy(source, target))[1])
    return made


def test_copy_is_the_data_set_under_its_hash(digits, tmp_path, copies):
    staged = stage(digits, tmp_path / "node")
    manifest = open_dataset(digits).manifest
    assert staged.folder == tmp_path / "node" / manifest.data_hash
    assert content(staged.folder) == content(digits)
    assert staged.manifest == manifest
    assert {p.name for p in copies} == set(manifest.files)


def test_it_is_copied_once_a_node(digits, tmp_path, copies):
    with ThreadPoolExecutor(4) as ranks:
        folders = list(ranks.map(lambda _: stage(digits, tmp_path).folder, range(4)))
    assert len(set(folders)) == 1
    assert len(copies) == len(open_dataset(digits).manifest.files)


@pytest.mark.parametrize("harm", ["file", "missing", "manifest"])
def test_a_damaged_copy_is_made_again(harm, digits, tmp_path, copies):
    folder = stage(digits, tmp_path).folder
    if harm == "file":
        raw = bytearray((folder / "train.beton").read_bytes())
        raw[-9] ^= 1
        (folder / "train.beton").write_bytes(bytes(raw))
        os.utime(folder / "train.beton", ns=(1, 1))  # not the moment that its hash was kept for
    elif harm == "missing":
        (folder / "test.beton").unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    assert content(stage(digits, tmp_path).folder) == content(digits)
    assert len(copies) == 2 * len(open_dataset(digits).manifest.files)


def test_what_a_killed_process_left_is_no_copy(digits, tmp_path):
    left = temporary(tmp_path / open_dataset(digits).manifest.data_hash)
    left.mkdir()
    (left / "train.beton").write_bytes(b"half")
    assert content(stage(digits, tmp_path).folder) == content(digits)
    assert not left.exists()


def test_damage_on_the_shared_storage_is_found_and_nothing_kept(digits_copy, tmp_path):
    path = digits_copy / "train.beton"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"train\.beton: the file's sha256"):
        stage(digits_copy, tmp_path / "node")
    assert [p.suffix for p in (tmp_path / "node").iterdir()] == [".lock"]


def test_places_that_cannot_be_written(digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied"):
        stage(digits, tmp_path / "file")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"takes .* GiB, 0\.0 GiB are free"):
        stage(digits, tmp_path / "node")
    with pytest.raises(UserError, match="not a dataset folder"):
        stage(tmp_path, tmp_path / "node")
