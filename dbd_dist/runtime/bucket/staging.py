"""Runs whose storage is an object store: staged in a folder of this machine, fetched at the start, uploaded meanwhile.

The command's process does it, beside the training and whichever launcher runs that: what workers write is found by
looking. So the training knows folders only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.config import TrainConfig
from dbd_dist.runtime.bucket import store
from dbd_dist.runtime.bucket.address import shown
from dbd_dist.runtime.bucket.folder import make_folder, staging_folder
from dbd_dist.runtime.bucket.upload import FOLDERS, RESULT_FILE, Upload
from dbd_dist.runtime.checkpoint import STATE_FILE, Checkpoints, StageStore, checkpoint_files
from dbd_dist.runtime.keys import keys_on
from dbd_dist.runtime.mirror import Mirror
from dbd_dist.runtime.run_folder import RUN_FILE

log = logging.getLogger(__name__)
LOCK_FILE = ".staging.lock"
_OF_FINISHED = (RUN_FILE, RESULT_FILE, "metrics.jsonl")
"""What is fetched of a run that is finished: all that its command looks at."""


class Staging:
    """A storage's address, and the folder of this machine that stands for it.

    Args:
        address: of an object store, see `address.address_of`.
    """

    def __init__(self, address: str):
        self.address = address
        self.folder = staging_folder(address)

    def check(self) -> None:
        """Find whether the store can be used, before anything is started; make the folder.

        Raises:
            UserError: it cannot, or the folder cannot be made.
        """
        store.check(self.address)
        make_folder(self.folder)

    def run_address(self, name: str) -> str:
        """The address of a run, for people."""
        return f"{shown(self.address).partition('?')[0]}/{name}"

    @contextmanager
    def run(self, name: str, config: TrainConfig, data_hash: str, num_classes: int) -> Iterator[None]:
        """Fetch a run and stages that it can reuse; upload it while the body runs, and what is left at its end.

        Of a run that has finished and is uploaded whole, the folder keeps nothing.

        Args:
            data_hash, num_classes: of the data set.

        Raises:
            UserError: another run of that name is staged here, the store cannot be read, or what the body left could
                not be uploaded for `compute.patience_s`.
        """
        folder = self.folder / name
        mirror = Mirror(self.address, self.folder, flag="--storage")
        with lock.held(folder / LOCK_FILE, self.run_address(name)):
            stored = self._fetch(mirror, folder)
            if folder / RESULT_FILE not in stored:
                stored |= self._fetch_stages(mirror, config, data_hash, num_classes)
            upload = Upload(mirror, self.folder, folder, stored)
            upload.start()
            patience = config.compute.patience_s
            try:
                yield
            except KeyboardInterrupt:
                upload.stop()  # at once, as it was asked for
                raise
            except BaseException:
                if not upload.finish(patience):
                    log.warning("%s is not uploaded whole (%s); what is left is kept in %s, and the same command "
                                "uploads it", self.run_address(name), upload.reason, folder)  # fmt: skip
                raise
            if not upload.finish(patience):
                raise UserError(
                    f"the run has ended, and is not uploaded whole: {upload.reason}, tried for {patience:.0f} s",
                    where=self.run_address(name),
                    hint=f"bring the store back; what is left is kept in {folder}, and the same command uploads it",
                )
            if (folder / RESULT_FILE).exists():
                _clear(folder)

    def _fetch(self, mirror: Mirror, run: Path) -> dict[Path, int]:
        """Bring the newest state of a run here.

        Returns:
            The files that the store has of the run, with their bytes.
        """
        stored = mirror.sizes(run)
        if run / RUN_FILE in stored:
            self._fetch_identity(mirror, run)
        if run / RESULT_FILE in stored:
            if not (run / RESULT_FILE).exists():
                _clear(run)  # another machine has finished what was begun here
            for name in _OF_FINISHED:
                mirror.fetch(run, pattern=name)
            return stored
        folder = run / "checkpoints"
        newest = Checkpoints(folder, is_main=False).newest()
        there = max((_order(path.name) for path in stored if path.parent == folder), default=None)
        if there is not None and (newest is None or _order(newest[0]) < there):
            mirror.fetch(folder, pattern="checkpoint_*.pt", replace=True)
        return stored

    def _fetch_identity(self, mirror: Mirror, path: Path) -> None:
        """run.json, which says what run this is: the store's counts.

        Raises:
            UserError: what is staged here is of another run, and has checkpoints.
        """
        before = (path / RUN_FILE).read_bytes() if (path / RUN_FILE).exists() else None
        mirror.fetch(path, pattern=RUN_FILE, replace=True)
        if before is None or (path / RUN_FILE).read_bytes() == before:
            return
        (path / RUN_FILE).write_bytes(before)
        if checkpoint_files(path / "checkpoints") or (path / RESULT_FILE).exists():
            raise UserError(
                f"the run staged here is not the one in {self.run_address(path.name)}",
                where=path,
                hint="delete one of the two, or choose another --name",
            )
        (path / RUN_FILE).unlink()
        mirror.fetch(path, pattern=RUN_FILE)

    def _fetch_stages(self, mirror: Mirror, config: TrainConfig, data_hash: str, num_classes: int) -> dict[Path, int]:
        """Finished stages that the run can begin with. Which precision it will compute in is known to its workers
        only: those of both are looked for.

        Returns:
            All that the store has, with their bytes.
        """
        stored, workers = mirror.sizes(self.folder / "stages"), config.compute.workers or 1
        for bf16 in (False, True):
            for stage, key in keys_on(config, data_hash, num_classes, bf16=bf16, workers=workers).items():
                path = StageStore(self.folder / "stages").path(stage, key)
                if path in stored:
                    mirror.fetch(path.parent, pattern=STATE_FILE)
        return stored


def _order(checkpoint: str) -> tuple[int, str]:
    """Sorts names of checkpoints by their numbers, which have six digits or more."""
    return len(checkpoint), checkpoint


def _clear(run: Path) -> None:
    """Remove a run's files; runs below its folder, and the lock, stay."""
    for name in (*FOLDERS, "ray"):
        shutil.rmtree(run / name, ignore_errors=True)
    for path in run.iterdir():
        if path.is_file() and path.name != LOCK_FILE:
            with suppress(OSError):
                path.unlink()
