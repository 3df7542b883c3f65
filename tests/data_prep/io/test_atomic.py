"""Files and folders appear whole or not at all, and what a killed process leaves is recognised."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.io import atomic
from data_prep.io.json import read_json, sealed, unsealed, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with atomic.replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.parent == tmp_path  # on the same disk, or it could not be renamed
    assert path.read_text() == "new"
    atomic.write_bytes(path, b"a", memoryview(b"bc"), sync=True)
    assert path.read_bytes() == b"abc"
    atomic.write_text(path, "ü")
    assert path.read_bytes() == "ü".encode()
    assert names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(error, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write() -> None:
        with atomic.replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert (path.read_text(), names(tmp_path)) == ("old", ["x.txt"])


def test_the_error_is_the_first_one_where_the_folder_is_gone(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.write_text(tmp_path / "none" / "x", "")


@pytest.mark.parametrize("before", [None, "empty"])
def test_a_folder_appears_when_the_block_ends(before, tmp_path):
    path = tmp_path / "above" / "folder"
    if before == "empty":
        path.mkdir(parents=True)
    with atomic.replacing_folder(path) as partial:
        (partial / "x").write_text("new")
        assert not (path / "x").exists()
    assert (names(path), names(tmp_path / "above")) == (["x"], ["folder"])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_replaced_only_where_that_was_asked_for(overwrite, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def write() -> None:
        with atomic.replacing_folder(path, overwrite=overwrite) as partial:
            (partial / "new").touch()

    if overwrite:
        write()
    else:
        with pytest.raises(OSError, match=r"not empty|exists"):
            write()
    assert (names(path), names(tmp_path)) == (["new" if overwrite else "old"], ["folder"])


def test_an_old_folder_survives_a_rename_that_fails(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if (self / "new").exists():
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"), atomic.replacing_folder(path, overwrite=True) as partial:
        (partial / "new").touch()
    assert (names(path), names(tmp_path)) == (["old"], ["folder"])


def test_folders_made_for_nothing_are_removed_but_none_that_holds_something(tmp_path):
    def write(beside: bool) -> None:
        with atomic.replacing_folder(tmp_path / "a" / "b" / "c"):
            if beside:
                (tmp_path / "a" / "mine").touch()
            raise OSError("no")

    for beside in (False, True):
        with pytest.raises(OSError, match="no"):
            write(beside)
        assert names(tmp_path) == (["a"] if beside else [])
    assert names(tmp_path / "a") == ["mine"]


def test_stale_temporary_files_are_recognised(tmp_path):
    stale = [atomic.temporary(tmp_path / name) for name in ("a.json", "b.beton")]
    for path in stale:
        path.touch()
    folder = atomic.temporary(tmp_path / "folder")
    (folder / "deep").mkdir(parents=True)
    kept = [".hidden", ".x.partial", ".x.12.partial", "a.json", "a.0123abcd.partial"]
    for name in kept:
        (tmp_path / name).touch()
    atomic.remove_stale(tmp_path, "a.json")
    assert names(tmp_path) == sorted([*kept, stale[1].name, folder.name])
    atomic.remove_stale(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_a_sealed_object_tells_of_an_edit(tmp_path):
    content = {"b": 1, "a": ["ü", None, 0.5]}
    write_json(tmp_path / "x.json", sealed(content))
    assert unsealed(read_json(tmp_path / "x.json")) == content
    edited = json.loads((tmp_path / "x.json").read_text()) | {"b": 2}
    for broken in (edited, content, content | {"checksum": 3}):
        with pytest.raises(ValueError, match="edited"):
            unsealed(broken)
