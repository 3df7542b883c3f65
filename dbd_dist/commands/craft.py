"""`dbd craft ATTACK`: clean dataset folder -> artefact of an attack that needs a trained model."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union

import tyro

from data_prep.dataset.manifest import Dataset, open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from dbd_dist.craft import CRAFTS, job
from dbd_dist.craft.craft import Craft, TrainingSet
from dbd_dist.distributed.world import check_device
from dbd_dist.launch.failures import RunFailed
from dbd_dist.launch.local import check_place, craft_local
from dbd_dist.launch.start import STORAGE, check_before_data, check_storage, launch, ray_train
from dbd_dist.models.exported import read_exported
from dbd_dist.presets import PRESETS, preset
from dbd_dist.runtime import disk
from dbd_dist.runtime.run_folder import RunFolder

AnyCraft = TypeVar("AnyCraft", bound=Craft)


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[AnyCraft]):
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
        return given if given.suffix == ".safetensors" else given / NETWORKS[self.craft.network].file


@dataclass(frozen=True, kw_only=True)
class WithSurrogate(Arguments[AnyCraft]):
    surrogate: Path | None = None
    """Run folder of the classifier to work against. Default: one is trained without defence on the data set."""


@dataclass(frozen=True, kw_only=True)
class WithBackbone(Arguments[AnyCraft]):
    backbone: Path | None = None
    """Self-supervised backbone: a run folder with backbone.safetensors, or such a file with its .json beside it.
    Default: one is trained on the data set."""


class Network(NamedTuple):
    arguments: Any
    file: str
    """Of the weights in a run folder."""
    method: str
    """That it is trained with here."""
    stop_after: str | None = None


NETWORKS = {
    "surrogate": Network(WithSurrogate, "model.safetensors", "none"),
    "backbone": Network(WithBackbone, "backbone.safetensors", "dbd", stop_after="simclr"),
}


def commands() -> Any:
    """The subcommands, one for each crafted attack."""
    parts = []
    for name, craft in CRAFTS.items():
        subcommand = tyro.conf.subcommand(name, description=inspect.getdoc(craft))
        parts.append(Annotated[NETWORKS[craft.network].arguments[craft], subcommand])
    return Union[tuple(parts)]  # noqa: UP007


def parse(argv: list[str]) -> Arguments:
    """The command line's arguments, or tyro's message and exit."""
    if argv and not argv[0].startswith("-"):
        CRAFTS.find(argv[0], where="dbd craft")
    return tyro.cli(commands(), args=argv, prog="dbd craft")


def main(argv: list[str]) -> int:
    """Parse, train the network where none is given, craft, print what it came to."""
    arguments = parse(argv)
    start = time.monotonic()
    craft, out = arguments.craft, Path(os.path.realpath(arguments.out))
    check_place(out, hint="choose another --out")
    dataset = open_dataset(arguments.data)
    if "truth.parquet" not in dataset.manifest.files:
        what = "nobody vouches for the labels of this data set"
        raise UserError(what, where=dataset.folder, expected="one that is not untrusted")
    data = TrainingSet.read(dataset)
    job.check_data(craft, data)
    job.finished(out, craft, job.settings(craft), data, overwrite=arguments.overwrite)  # before a network is trained
    if arguments.launcher == "local":
        check_device(arguments.device)

    given = arguments.network
    weights = _trained(arguments, dataset) if given is None else arguments.weights(given)
    exported = read_exported(weights)
    job.check_network(craft, exported, dataset)
    made_with = job.settings(craft, dataset, exported)
    with _alone(out):
        artefact = job.finished(out, craft, made_with, data, overwrite=arguments.overwrite)
        if artefact is not None and _is_main():
            print(f"{out} is finished; it stands.")
        if artefact is None:
            work = job.work_folder(out, made_with, craft)
            task = job.Job(craft=craft, data=dataset.folder.resolve(), weights=weights.resolve(), work=work)
            if _is_main():
                disk.check_craft(craft, data, work)
            _craft(arguments, task)
            if _is_main():
                artefact = job.finish(task, out, made_with, data)
    if _is_main() and artefact is not None:
        print(f"{craft.summary(artefact.evidence)}\n\n{out}: {craft.name}, {time.monotonic() - start:.0f} s")
    return 0


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _alone(out: Path) -> AbstractContextManager[object]:
    """Keeps other commands off an artefact and the parts of it that lie beside it; for one of torchrun's ranks."""
    if not _is_main():
        return nullcontext()
    return lock.held(out.with_name(f".{out.name}.lock"), str(out), flag="--out")


def _trained(arguments: Arguments, dataset: Dataset) -> Path:
    """The weights of the network that this command trains: of its run, which resumes where it was cut off."""
    if arguments.preset not in PRESETS:
        raise UserError(f"there is no preset {arguments.preset!r}", where="--preset", expected=", ".join(PRESETS))
    network = NETWORKS[arguments.craft.network]
    config = preset(arguments.preset).config(network.method)
    compute = config.compute
    if arguments.workers is not None:
        compute = dataclasses.replace(compute, workers=arguments.workers)
    if arguments.device != "auto":
        compute = dataclasses.replace(compute, device=arguments.device)
    config = dataclasses.replace(
        config,
        stop_after=network.stop_after,
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


def _craft(arguments: Arguments, task: job.Job) -> None:
    """Run the job; a UserError leaves no work folder, unless there was one to resume."""
    fresh = _is_main() and not task.work.exists()
    if _is_main():
        try:
            task.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot be made ({error.strerror})", where=task.work.parent) from error
    try:
        if arguments.launcher == "local":
            craft_local(task, arguments.device)
        else:
            ray_train().craft_ray(task, workers=arguments.workers, device=arguments.device)
    except UserError:
        if fresh:
            shutil.rmtree(task.work, ignore_errors=True)
        raise
    except Exception as error:  # a mistake of our own keeps its traceback
        module = type(task.craft).__module__
        if isinstance(error, RunFailed) or module.startswith("dbd_dist."):
            raise
        raise RunFailed(
            f"{task.craft.name}, a craft of {module}, failed ({type(error).__name__}: {error})",
            where=task.work,
            hint="fix it and run the same command again: finished parts stay; --debug shows where it failed",
        ) from error
    finally:
        if _is_main():
            task.progress.unlink(missing_ok=True)
