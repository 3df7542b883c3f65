"""Hashes of files that did not change, kept for the next process of this user on this machine.

A file is taken for unchanged while its place, size, modification and change time, inode and device stay. That is no
proof: a disk that loses a bit changes none of them. `dbd doctor` therefore never asks here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from pathlib import Path

from data_prep.io.hashes import sha256_file

FILE = "sha256.json"
MOST = 4096
"""Files remembered; the oldest go first."""
SETTLED_S = 2.5
"""A file is remembered once its last change is so many seconds past: file systems count time in steps of up to two
seconds, and a second change within one leaves no trace."""

LOCK_WAIT_S = 1.0

_MAX_BYTES = MOST * 200
_ENTRY = re.compile(r"[0-9a-f]{64}")
_here: dict[str, str] = {}


def cached_sha256(path: Path) -> str:
    """Hex sha256 of a file: of its bytes, or where it did not change since, of when they were last hashed.

    Raises:
        OSError: it cannot be read.
    """
    before = path.stat()
    key = _key(path, before)
    known = _here.get(key) or _load().get(key)
    if known is not None:
        _here[key] = known
        return known
    start = time.time()
    found = sha256_file(path)
    if key == _key(path, path.stat()) and start - max(before.st_mtime, before.st_ctime) > SETTLED_S:
        _here[key] = found
        _store({key: found})
    return found


def _key(path: Path, at: os.stat_result) -> str:
    """Device numbers mean something on one machine only, and home folders may be shared."""
    what = (
        os.uname().nodename, os.path.realpath(path), at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev,
    )  # fmt: skip
    return hashlib.sha256(repr(what).encode(errors="surrogateescape")).hexdigest()


def folder() -> Path | None:
    """Where hashes are kept; None where there is no such place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification has relative ones ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "dbd-dist" if os.path.isabs(base) else None


def _load() -> dict[str, str]:
    """What is kept; nothing where it cannot be read, or where somebody else can write it."""
    place = folder()
    try:
        if place is None or not _is_ours(os.lstat(place), stat.S_ISDIR):
            return {}
        handle = os.open(place / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not _is_ours(os.fstat(handle), stat.S_ISREG):
                return {}
            content = file.read(_MAX_BYTES + 1)
        kept = json.loads(content) if len(content) <= _MAX_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {k: v for k, v in kept.items() if _ENTRY.fullmatch(k) and isinstance(v, str) and _ENTRY.fullmatch(v)}


def _is_ours(at: os.stat_result, kind) -> bool:
    return kind(at.st_mode) and at.st_uid == os.geteuid() and not at.st_mode & 0o022


def _lock(handle: int) -> None:
    """Wait for other processes, but not for long: an entry that is lost costs one more hash.

    Raises:
        OSError: another holds it all the time, or the file system has no locks.
    """
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.005)


def _store(new: dict[str, str]) -> None:
    """Add entries. Whatever is in the way is no error: the file is hashed again next time."""
    place = folder()
    if place is None:
        return
    aside = place / f".{FILE}.{os.getpid()}"
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(os.lstat(place), stat.S_ISDIR):
            return
        with open(os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as lock:
            _lock(lock.fileno())
            kept = {k: v for k, v in _load().items() if k not in new} | new
            kept = dict(list(kept.items())[-MOST:])
            try:
                handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                with open(handle, "w") as file:
                    json.dump(kept, file)
                os.replace(aside, place / FILE)
            finally:
                with contextlib.suppress(OSError):  # renamed, or never there
                    aside.unlink()
