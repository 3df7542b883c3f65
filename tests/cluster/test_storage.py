import os
from pathlib import Path

import pytest

from cluster import storage
from data_prep.errors import UserError


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("runs") == tmp_path / "runs"
    assert storage.resolve("~/runs") == Path.home() / "runs"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "empty"),
        ("s3:/bucket/x", "not a folder"),  # what pathlib makes of s3://bucket/x
        ("s3://bucket/x", "not a folder"),
        ("gs://bucket", "mount the bucket"),
        ("file:///x", "not a folder"),
    ],
)
def test_bad_paths(path, words):
    with pytest.raises(UserError, match=words):
        storage.resolve(path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(UserError, match="is a file"):
        storage.resolve(tmp_path / "f" / "runs")


def test_a_check_leaves_nothing(tmp_path):
    storage.check_writable(storage.resolve(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    storage.check_writable(storage.resolve(tmp_path / "kept"))
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_not_writable():
    with pytest.raises(UserError, match=r"cannot be written.*Hint"):
        storage.check_writable(storage.resolve("/proc/runs"))  # refused to root as well


def test_a_mark_is_seen_only_where_it_is(tmp_path):
    mark = storage.leave_mark(storage.resolve(tmp_path / "here"))
    assert mark.seen()
    elsewhere = storage.Mark(storage.resolve(tmp_path / "there"), mark.name, mark.content, tmp_path)
    assert not elsewhere.seen()


def test_file_system_is_that_of_the_deepest_mount():
    mounts = "\n".join(
        [
            "/dev/vda / ext4 rw 0 0",
            "srv:/x /data nfs4 rw 0 0",
            "tmpfs /data/fast tmpfs rw 0 0",
            "b /b\\040c fuse.s3 rw 0 0",
        ]
    )
    kinds = {p: storage.file_system(Path(p), mounts) for p in ("/home", "/data", "/database", "/b c")}
    # paths that do not exist are judged by the nearest folder above, which is / here
    assert kinds["/home"] == "ext4"
    assert kinds["/database"] == "ext4"
    if os.path.exists("/proc/mounts"):
        assert storage.file_system(Path("/proc")) == "proc"
