"""Hashes are kept between processes, and nothing that is kept can make a changed file look unchanged."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.beton.format import check_beton
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io import hashcache
from data_prep.io.hashes import sha256_file

OLD_NS = time.time_ns() - 10**12


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own; hashes of this process are forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashcache, "_here", {})
    monkeypatch.setattr(hashcache, "SETTLED_S", -1.0)  # change times cannot be set back
    return tmp_path / "cache" / "dbd-dist"


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Files that were read to be hashed."""
    read: list[Path] = []

    def record(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(hashcache, "sha256_file", record)
    return read


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


Forget = Callable[[], None]


@pytest.fixture
def forget(monkeypatch) -> Forget:
    """As a new process begins."""
    return lambda: monkeypatch.setattr(hashcache, "_here", {})


def test_a_file_is_read_once_by_all_processes_of_a_machine(cache, file, hashed, forget, monkeypatch):
    for _ in range(3):
        assert hashcache.cached_sha256(file) == sha256_file(file)
        forget()
    assert hashed == [file]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE((cache / "sha256.json").stat().st_mode) == 0o600
    assert sorted(p.name for p in cache.iterdir()) == [".lock", "sha256.json"]
    assert str(file) not in (cache / "sha256.json").read_text()
    assert b"content" not in (cache / "sha256.json").read_bytes()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "another", "", "", "")))
    hashcache.cached_sha256(file)
    assert hashed == [file, file]  # device and inode of another machine mean nothing here


def test_every_trace_of_a_change_counts(cache, file, hashed, forget):
    before = hashcache.cached_sha256(file)
    at = file.stat()
    file.write_bytes(b"changed")  # as many bytes, the same inode
    os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))  # and the old time: what remains is the time of the change
    forget()
    assert hashcache.cached_sha256(file) == sha256_file(file) != before
    other = file.with_name("other")
    other.write_bytes(b"content")
    os.replace(other, file)
    assert hashcache.cached_sha256(file) == before
    assert len(hashed) == 3


def test_a_file_that_changed_just_now_is_not_remembered(cache, file, hashed, monkeypatch):
    """A second change within one step of the file system's clock would leave no trace."""
    monkeypatch.setattr(hashcache, "SETTLED_S", 2.5)
    for content in (b"content", b"changed"):
        file.write_bytes(content)
        os.utime(file, ns=(OLD_NS, OLD_NS))
        assert hashcache.cached_sha256(file) == sha256_file(file)
    assert len(hashed) == 2
    assert not cache.exists()
    monkeypatch.setattr(time, "time", lambda: OLD_NS / 1e9 + 10**6)
    for _ in range(2):
        hashcache.cached_sha256(file)
    assert len(hashed) == 3


def test_a_file_that_changes_while_it_is_read_is_not_remembered(cache, file, monkeypatch):
    def meanwhile(path: Path) -> str:
        found = sha256_file(path)
        path.write_bytes(b"longer than before")
        return found

    monkeypatch.setattr(hashcache, "sha256_file", meanwhile)
    hashcache.cached_sha256(file)
    assert not (cache / "sha256.json").exists()


def plant(cache: Path, file: Path, sha256: str) -> Path:
    """What a forger who can write the cache would leave."""
    cache.mkdir(parents=True, mode=0o700)
    path = cache / "sha256.json"
    path.write_text(json.dumps({hashcache._key(file, file.stat()): sha256}))
    path.chmod(0o600)
    return path


def test_what_is_planted_is_believed_only_where_nobody_else_can_write(cache, file, forget, monkeypatch):
    lie, true = "0" * 64, sha256_file(file)
    path = plant(cache, file, lie)
    assert hashcache.cached_sha256(file) == lie  # the forgery works: what follows says something
    for harm, undo in (
        (lambda: path.chmod(0o622), lambda: path.chmod(0o600)),
        (lambda: cache.chmod(0o770), lambda: cache.chmod(0o700)),
        (lambda: (path.rename(cache / "x"), path.symlink_to("x")), lambda: (cache / "x").replace(path)),
    ):
        forget()
        harm()
        assert hashcache._load() == {}
        undo()
        forget()
        assert hashcache._load()
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    assert hashcache._load() == {}
    assert hashcache.cached_sha256(file) == true
    assert json.loads(path.read_text()).popitem()[1] == lie  # nor is another's cache written


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"[" * 10**5, b"\xff", b'{"a": 1}', b'{"' + b"a" * 64 + b'": "x"}', b" " * 10**6]
)
def test_a_cache_that_is_damaged_is_made_anew(cache, file, content):
    plant(cache, file, "").write_bytes(content)
    assert hashcache.cached_sha256(file) == sha256_file(file)
    assert list(json.loads((cache / "sha256.json").read_text()).values()) == [sha256_file(file)]


@pytest.mark.parametrize("kind", ["file in its place", "read-only", "pipe", "relative", "no home"])
def test_a_cache_that_cannot_be_used_is_no_error(cache, file, kind, monkeypatch, tmp_path):
    if kind == "file in its place":
        cache.parent.write_text("")
    elif kind == "read-only":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")  # root may write any folder but this
    elif kind == "pipe":
        cache.mkdir(parents=True, mode=0o700)
        os.mkfifo(cache / "sha256.json", 0o600)
        os.mkfifo(cache / ".lock", 0o600)
    elif kind == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "cache")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert hashcache.folder() == tmp_path / "home" / ".cache" / "dbd-dist"
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert hashcache.folder() is None
    assert hashcache.cached_sha256(file) == sha256_file(file)


def test_it_is_bounded_and_forgets_the_oldest(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(hashcache, "MOST", 3)
    for i in range(5):
        path = tmp_path / str(i)
        path.write_text(str(i))
        hashcache.cached_sha256(path)
    kept = [*json.loads((cache / "sha256.json").read_text()).values()]
    assert kept == [sha256_file(tmp_path / str(i)) for i in (2, 3, 4)]


def test_several_processes_at_once_leave_a_whole_file(cache, tmp_path):
    code = (
        "import sys; from pathlib import Path; from data_prep.io import hashcache\n"
        "hashcache.SETTLED_S, hashcache.LOCK_WAIT_S = -1, 60\n"
        "for i in range(40):\n"
        "    path = Path(sys.argv[1]) / f'{sys.argv[2]}-{i}'; path.write_text(path.name); hashcache.cached_sha256(path)"
    )
    root = str(Path(__file__).resolve().parents[2])
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], env={**os.environ, "PYTHONPATH": root})
        for i in range(3)
    ]
    while any(process.poll() is None for process in started):
        hashcache._load()
        if (cache / "sha256.json").exists():
            json.loads((cache / "sha256.json").read_text())
    assert [process.returncode for process in started] == [0, 0, 0]
    true = {sha256_file(p) for p in tmp_path.iterdir() if p.is_file()}
    kept = json.loads((cache / "sha256.json").read_text())
    assert len(kept) == 120  # each waited for the others, and none wrote over another's
    assert set(kept.values()) == true


def test_a_lock_that_another_holds_costs_an_entry_and_no_more(cache, file, monkeypatch):
    cache.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(hashcache, "LOCK_WAIT_S", 0.05)
    with (cache / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert hashcache.cached_sha256(file) == sha256_file(file)
        assert not (cache / "sha256.json").exists()


def test_opening_a_data_set_asks_and_the_doctor_does_not(cache, digits_copy, forget):
    open_dataset(digits_copy)
    path = digits_copy / "test.beton"
    lie = sha256_file(path)
    content = bytearray(path.read_bytes())
    content[int(check_beton(path).data_ptr[0])] ^= 1  # a pixel: tables are looked at whatever the hash
    path.write_bytes(content)
    kept = json.loads((cache / "sha256.json").read_text()) | {hashcache._key(path, path.stat()): lie}
    (cache / "sha256.json").write_text(json.dumps(kept))
    forget()
    open_dataset(digits_copy)
    with pytest.raises(UserError, match=r"test\.beton: the file's sha256 is not that of the manifest"):
        open_dataset(digits_copy, cached=False)
