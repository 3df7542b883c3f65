"""`dbd craft ATTACK`: clean dataset folder -> artefact of an attack that needs a trained model."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, Union

import tyro

from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from dbd_dist.commands.train import STORAGE, check_before_data, check_storage, launch
from dbd_dist.craft import CRAFTS, job
from dbd_dist.craft.craft import Craft, TrainingSet
from dbd_dist.models.exported import read_exported
from dbd_dist.runtime import disk, lock

AnyCraft = TypeVar("AnyCraft", bound=Craft)


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[AnyCraft]):
    file: ClassVar[str]
    """Of the network's weights in a run folder."""
    run: ClassVar[dict[str, Any]]
    """How the network is trained here: what the preset does not decide."""

    craft: Annotated[AnyCraft, tyro.conf.arg(name="")]
    data: Path
    """Clean dataset folder, as `dbd prepare SOURCE clean` writes it."""
    out: Path
    """The artefact's folder; on a cluster, on a path that all nodes share. Work in progress lies hidden beside it."""
    preset: str = "demo"
    """Where the network that is trained here has its settings from; `dbd train --help` lists presets."""
    name: str | None = None
    """Its run is NAME/surrogate or NAME/backbone under the storage. Default: the name of --out."""
    storage: Path = STORAGE
    """Where run folders lie; on a cluster, a path that all nodes share. Default: $DBD_STORAGE, or runs/."""
    launcher: Literal["ray", "local"] = "ray"
    """ray: Ray Train workers. local: this process, or torchrun's, without Ray."""
    workers: int | None = None
    """Processes that work together. Default: one a GPU, or one a machine without; the preset's for its training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is any, else the CPU; for its training the preset's."""
    overwrite: bool = False
    """Replace an artefact that was made otherwise."""

    def __post_init__(self):
        if self.workers is not None and self.workers < 1:
            raise UserError(f"{self.workers} is not allowed", where="--workers", expected="a number >= 1")
        if self.out.name in ("", ".."):
            raise UserError(f"{str(self.out)!r} names no folder to make", where="--out", expected="a new folder's path")
        if len(os.fsencode(self.out.name)) > 200:  # the hidden folder beside it has a longer one
            raise UserError("the folder's name is too long", where="--out", expected="at most 200 bytes")

    @property
    def network(self) -> Path | None:
        """The surrogate or backbone that is given."""
        return getattr(self, self.craft.network)

    def weights(self, given: Path) -> Path:
        """The weights' file in a run folder, or the file itself."""
        return given if given.suffix == ".safetensors" else given / self.file


@dataclass(frozen=True, kw_only=True)
class WithSurrogate(Arguments[AnyCraft]):
    file: ClassVar[str] = "model.safetensors"
    run: ClassVar[dict[str, Any]] = {"method": "none"}

    surrogate: Path | None = None
    """Run folder of the classifier to work against. Default: one is trained without defence on the data set."""


@dataclass(frozen=True, kw_only=True)
class WithBackbone(Arguments[AnyCraft]):
    file: ClassVar[str] = "backbone.safetensors"
    run: ClassVar[dict[str, Any]] = {"method": "dbd", "stop_after": "simclr"}

    backbone: Path | None = None
    """Self-supervised backbone: a run folder with backbone.safetensors, or such a file with its .json beside it.
    Default: one is trained on the data set."""


ARGUMENTS = {"surrogate": WithSurrogate, "backbone": WithBackbone}


def commands() -> Any:
    """The subcommands, one for each crafted attack."""
    return Union[  # noqa: UP007
        tuple(
            Annotated[ARGUMENTS[craft.network][craft], tyro.conf.subcommand(name, description=inspect.getdoc(craft))]
            for name, craft in CRAFTS.items()
        )
    ]


def main(argv: list[str]) -> int:
    """Parse, train the network where none is given, craft, print what it came to."""
    arguments: Arguments = tyro.cli(commands(), args=argv, prog="dbd craft")
    from dbd_dist.launch.local import check_place

    start = time.monotonic()
    craft, out = arguments.craft, Path(os.path.realpath(arguments.out))
    check_place(out, hint="choose another --out")
    dataset = open_dataset(arguments.data)
    if "truth.parquet" not in dataset.manifest.files:
        raise UserError(
            "nobody vouches for the labels of this data set", where=dataset.folder, expected="one that is not untrusted"
        )
    data = TrainingSet.read(dataset)
    job.check_data(craft, data)
    finished = functools.partial(job.finished, out, craft, fingerprint=data.fingerprint, overwrite=arguments.overwrite)
    finished(job.settings(craft))  # a network is not trained in vain
    if arguments.launcher == "local":
        from dbd_dist.distributed.world import check_device

        check_device(arguments.device)

    weights = _trained(arguments, dataset) if arguments.network is None else arguments.weights(arguments.network)
    exported = read_exported(weights)
    job.check_network(craft, exported, dataset)
    made_with = job.all_settings(craft, dataset, exported)
    artefact = finished(made_with)
    if artefact is not None and _is_main():
        print(f"{out} is finished; it stands.")
    if artefact is None:
        with _alone(out):
            artefact = finished(made_with)  # another command may have made it just now
            if artefact is None:
                work = job.work_folder(out, made_with, craft)
                task = job.Job(craft=craft, data=dataset.folder.resolve(), weights=weights.resolve(), work=work)
                if _is_main():
                    disk.check_craft(craft, data, work)
                _craft(arguments, task)
                if not _is_main():
                    return 0
                artefact = job.finish(task, out, made_with, data)
    if _is_main():
        print(f"{craft.summary(artefact.evidence)}\n\n{out}: {craft.name}, {time.monotonic() - start:.0f} s")
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _alone(out: Path) -> AbstractContextManager[None]:
    """Keeps other commands off an artefact and the parts of it that lie beside it; for one of torchrun's ranks."""
    if not _is_main():
        return nullcontext()
    return lock.held(out.with_name(f".{out.name}.lock"), str(out), flag="--out")


def _trained(arguments: Arguments, dataset: Dataset) -> Path:
    """The weights of the network that this command trains: of its run, which resumes where it was cut off."""
    from dbd_dist.presets import PRESETS, preset
    from dbd_dist.runtime.run_folder import RunFolder

    if arguments.preset not in PRESETS:
        raise UserError(f"there is no preset {arguments.preset!r}", where="--preset", expected=", ".join(PRESETS))
    config = preset(arguments.preset).train
    compute = config.compute
    if arguments.workers is not None:
        compute = dataclasses.replace(compute, workers=arguments.workers)
    if arguments.device != "auto":
        compute = dataclasses.replace(compute, device=arguments.device)
    config = dataclasses.replace(
        config,
        **arguments.run,
        data=dataset.folder.resolve(),
        seed=arguments.craft.seed,
        compute=compute,
    )
    parent = arguments.name if arguments.name is not None else arguments.out.resolve().name
    name = f"{parent}/{arguments.craft.network}" if parent else ""
    check_before_data(config, name, arguments.launcher)
    if _is_main():
        check_storage(arguments.storage)
    folder = RunFolder((arguments.storage / name).resolve())
    weights = arguments.weights(folder.path)
    if weights.exists() and weights.with_suffix(".json").exists():
        folder.claim(config, dataset)
    else:
        launch(config, arguments.storage, name, arguments.launcher)
    return weights


def _craft(arguments: Arguments, job: job.Job) -> None:
    """Run the job; what its user has to mend leaves no work folder, unless there was one to resume."""
    fresh = _is_main() and not job.work.exists()
    if _is_main():
        try:
            job.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be made ({error.strerror})", where=job.work.parent) from error
    try:
        if arguments.launcher == "local":
            from dbd_dist.launch.local import craft_local

            craft_local(job, arguments.device)
            return
        try:
            from dbd_dist.launch.ray_train import craft_ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError("Ray is not installed", where="--launcher ray", hint="use --launcher local") from error
        craft_ray(job, workers=arguments.workers, device=arguments.device)
    except UserError:
        if fresh:
            shutil.rmtree(job.work, ignore_errors=True)
        raise
    finally:
        if _is_main():
            job.progress.unlink(missing_ok=True)
