"""Uploading a run while it is trained: a thread looks for what is new in its folder."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from dbd_dist.runtime.bucket.store import reason_of
from dbd_dist.runtime.checkpoint import STATE_FILE, checkpoint_files
from dbd_dist.runtime.mirror import Mirror
from dbd_dist.runtime.run_folder import ERROR_FILE, RUN_FILE
from dbd_dist.runtime.stopping import FILE as STOP_FILE

log = logging.getLogger(__name__)
EVERY_S = 1.0
"""Between two looks."""
LONGEST_WAIT_S = 30.0
"""Between two tries, while the store does not answer."""
RESULT_FILE = "result.json"
FOLDERS = ("checkpoints", "logs", "stalls", "tensorboard", "profile")
"""Of a run; other folders below it are other runs."""
_OWN = ("progress.json", STOP_FILE, ERROR_FILE)
"""What processes of this machine say to each other."""

Signature = tuple[int, int, int]


class Upload:
    """Keeps a run, and the finished stages beside it, in a mirror.

    At every moment the mirror holds what a run resumes from: run.json comes first, a checkpoint is removed once a newer
    one is there, and result.json, which says that the run is whole, comes last.

    Args:
        mirror: of `storage`.
        storage: the folder with the run and the stages.
        run: the run's folder.
        stored: files that the mirror has of the run and of stages, with their bytes.
    """

    def __init__(self, mirror: Mirror, storage: Path, run: Path, stored: Mapping[Path, int]):
        self._mirror, self._stages, self._run = mirror, storage / "stages", run
        self._sent = {path: _signature(path) for path in self._states() if stored.get(path) == path.stat().st_size}
        """What the mirror has. A stage is found by a hash over what it follows from: files of one name are the same."""
        if run / RESULT_FILE in stored:  # what was fetched of a finished run is no news
            self._sent |= {path: _signature(path) for path in self._rest()}
        self._old = {path for path in stored if path.parent == run / "checkpoints"}
        """Checkpoints in the mirror."""
        self._ending = threading.Event()
        self._patience_s: float | None = None
        self._failing = self._whole = False
        self.reason = "no answer yet"
        """Why the last try failed."""
        self._thread = threading.Thread(target=self._loop, name="upload", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End without a last look."""
        self._ending.set()

    def finish(self, patience_s: float) -> bool:
        """Upload everything that is left; returns whether that succeeded. A signal ends the wait.

        Args:
            patience_s: how long to try again while the store fails.
        """
        self._patience_s = patience_s
        self._ending.set()
        self._thread.join()
        return self._whole

    def _loop(self) -> None:
        wait = EVERY_S
        while not self._ending.wait(wait):
            wait = EVERY_S if self._try(everything=False) else min(2 * wait, LONGEST_WAIT_S)
        if self._patience_s is None:
            return
        end, wait = time.monotonic() + self._patience_s, EVERY_S / 2
        while not self._try(everything=True):
            left = end - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(wait, left))
            wait = min(2 * wait, LONGEST_WAIT_S)
        self._whole = True

    def _try(self, *, everything: bool) -> bool:
        """One look; says once when the store begins to fail, and when it is back."""
        try:
            self._round(everything=everything)
        except (OSError, pa.ArrowException) as error:
            self.reason = reason_of(error)
            if not self._failing:
                self._failing = True
                log.warning("%s cannot be written (%s); the run goes on, and it is tried again",
                            self._mirror.uri, self.reason)  # fmt: skip
            return False
        if self._failing:
            self._failing = False
            log.warning("%s can be written again", self._mirror.uri)
        return True

    def _round(self, *, everything: bool) -> None:
        """Send what is new. Files that grow with every step go along with checkpoints only, and at the end."""
        finished = (self._run / RESULT_FILE).exists()  # before others are listed: they were whole by then
        self._send(self._run / RUN_FILE)
        news = [self._send(path) for path in self._states()]
        kept = checkpoint_files(self._run / "checkpoints")
        news += [self._send(path) for path in kept]
        if not (any(news) or everything):
            return
        for old in self._old - set(kept) if kept else ():
            self._mirror.remove(old)
        self._old = set(kept)
        for path in self._rest():
            if path.name != RESULT_FILE:
                self._send(path)
        if finished:
            self._send(self._run / RESULT_FILE)

    def _states(self) -> list[Path]:
        return sorted(self._stages.glob(f"*/{STATE_FILE}"))

    def _rest(self) -> list[Path]:
        """Files of the run that are for others to read; descriptions after what they describe."""
        found = [path for path in self._run.glob("*") if path.is_file()]
        for name in FOLDERS[1:]:
            found += [path for path in (self._run / name).rglob("*") if path.is_file()]
        found = [path for path in found if not path.name.startswith(".") and path.name not in _OWN]
        return sorted(found, key=lambda path: (path.suffix == ".json", path.name == RESULT_FILE, path))

    def _send(self, path: Path) -> bool:
        """Send a file that is new or has changed since; returns whether it was.

        Raises:
            OSError, pa.ArrowException: the store has not taken it.
        """
        try:
            signature = _signature(path)
            if self._sent.get(path) == signature:
                return False
            self._mirror.send(path)
        except OSError:
            if not path.exists():  # removed meanwhile, as old checkpoints are
                return False
            raise
        self._sent[path] = signature
        return True


def _signature(path: Path) -> Signature:
    """Changes with the content: files are renamed into place, or grow."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
