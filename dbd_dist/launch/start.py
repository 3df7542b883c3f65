"""Starting a run: what is checked beforehand, the preset's own data set, and which launcher runs it."""

from __future__ import annotations

import dataclasses
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from data_prep.dataset.manifest import read_manifest
from data_prep.errors import UserError
from dbd_dist.config import TrainConfig
from dbd_dist.methods.method import HOLDOUT_CLEAN, Method
from dbd_dist.models.given import check_weights
from dbd_dist.presets import Preset
from dbd_dist.runtime.bucket.address import address_of
from dbd_dist.tracking import check_trackers

if TYPE_CHECKING:
    from dbd_dist.runtime.bucket.staging import Staging

STORAGE: Path = Path(os.environ.get("DBD_STORAGE") or "runs").expanduser()
"""Where run folders lie unless a command says otherwise."""


def prepare_for(chosen: Preset, seed: int, storage: Path, method: Method | None = None) -> Path:
    """The preset's own data set under the storage, prepared if it is not there; poisoned with the run's seed, and with
    clean images set aside where the method needs them."""
    from data_prep.pipeline import prepare

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "under torchrun every rank would prepare the data set",
            where="--data",
            hint="run `dbd prepare` first and name its folder",
        )
    wanted = dataclasses.replace(chosen.prepare, seed=seed, datasets=storage / "datasets")
    if method is not None and method.needs_clean:
        wanted = dataclasses.replace(wanted, holdout_clean=wanted.holdout_clean or HOLDOUT_CLEAN)
    return prepare(wanted).folder.resolve()


def check_before_data(config: TrainConfig, name: str, launcher: str) -> None:
    """What can be refused before a data set is prepared.

    Raises:
        UserError: the name, a network that a stage cannot train, weights that do not fit it, a data set without the
            clean images that the method needs, a device that is not there, or a Ray that does not answer.
    """
    from dbd_dist.launch.local import check_name

    check_name(name)
    for stage in config.method.stages():
        stage.check_network(config.model)
    check_trackers(config.compute.log)
    if os.environ.get("RANK", "0") == "0":
        check_weights(config.model)
    if config.data is not None:
        manifest = read_manifest(config.data)
        config.method.check_clean(manifest.counts, config.data)
        config.check_image_px(manifest.image_px)
    if launcher == "local":
        from dbd_dist.distributed.world import check_device

        check_device(config.compute.device)
    else:
        from cluster import address

        cluster = address.cluster_address(os.environ)
        if cluster is not None:
            address.check(cluster)


def check_storage(storage: Path) -> None:
    """Refuse what is not a folder that can be written.

    Raises:
        UserError: an object store's address, a file, or no permission.
    """
    from cluster import storage as places

    places.check_writable(places.resolve(storage))


def stage_storage(storage: str | Path) -> Staging | None:
    """The staging of a storage that is an object store, checked; None for a folder, which is checked too.

    Raises:
        UserError: it cannot be used.
    """
    address = address_of(storage)
    if address is None:
        if _is_main():
            check_storage(Path(storage))
        return None
    from dbd_dist.runtime.bucket.folder import check_torchrun
    from dbd_dist.runtime.bucket.staging import Staging

    check_torchrun()
    staging = Staging(address)
    if _is_main():
        staging.check()
    return staging


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def launch_staged(
    config: TrainConfig,
    staging: Staging | None,
    storage: Path,
    name: str,
    launcher: str,
    *,
    quiet: bool = False,
    cpus_per_worker: float | None = None,
) -> dict[str, Any] | None:
    """`launch`, with a run in an object store fetched before and uploaded meanwhile.

    Args:
        staging: of the store; None where `storage` is the storage itself.
        storage: the folder.
    """
    around: AbstractContextManager[None] = nullcontext()
    if staging is not None and _is_main():  # other ranks of torchrun wait for this one to join them
        assert config.data is not None
        manifest = read_manifest(config.data)
        around = staging.run(name, config, manifest.data_hash, manifest.num_classes)
    with around:
        return launch(config, storage, name, launcher, quiet=quiet, cpus_per_worker=cpus_per_worker)


def launch(
    config: TrainConfig,
    storage: Path,
    name: str,
    launcher: str,
    *,
    quiet: bool = False,
    cpus_per_worker: float | None = None,
) -> dict[str, Any] | None:
    """Run it; importing Ray, or not. `cpus_per_worker` is for Ray, see `run_ray`."""
    if launcher == "local":
        from dbd_dist.launch.local import run_local

        return run_local(config, storage=storage, name=name, quiet=quiet)
    return ray_train().run_ray(config, storage=storage, name=name, quiet=quiet, cpus_per_worker=cpus_per_worker)


def ray_train() -> ModuleType:
    """`dbd_dist.launch.ray_train`, imported only where Ray is wanted.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        from dbd_dist.launch import ray_train
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UserError("Ray is not installed", where="--launcher ray", hint="use --launcher local") from error
    return ray_train
