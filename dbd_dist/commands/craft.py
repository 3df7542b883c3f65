"""`dbd craft ATTACK`: clean dataset folder -> artefact of an attack that needs a trained model."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.errors import UserError
from dbd_dist.craft.config import AdaptiveConfig, LabelConsistentConfig
from dbd_dist.launch.start import STORAGE, check_before_data, check_storage, launch
from dbd_dist.runtime import lock


@dataclass(frozen=True, kw_only=True)
class Shared:
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


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(Shared):
    """Perturbed images for the label-consistent attack (Turner et al. 2019, arXiv 1912.02771).

    PGD raises a benign classifier's loss on images of the target class; `dbd prepare SOURCE label-consistent` stamps
    the trigger on them.
    """

    surrogate: Path | None = None
    """Run folder of the classifier to work against. Default: one is trained without defence on the data set."""
    config: Annotated[LabelConsistentConfig, tyro.conf.arg(name="")] = field(default_factory=LabelConsistentConfig)


@dataclass(frozen=True, kw_only=True)
class Adaptive(Shared):
    """A trigger that makes poisoned images cluster in a self-supervised feature space (Huang et al. 2022, sec. 5.4)."""

    backbone: Path | None = None
    """Self-supervised backbone: a run folder with backbone.safetensors, or such a file with its .json beside it.
    Default: one is trained on the data set."""
    config: Annotated[AdaptiveConfig, tyro.conf.arg(name="")] = field(default_factory=AdaptiveConfig)


Arguments = (
    Annotated[LabelConsistent, tyro.conf.subcommand("label-consistent")]
    | Annotated[Adaptive, tyro.conf.subcommand("adaptive")]
)


def main(argv: list[str]) -> int:
    """Parse, train the network where none is given, craft, print what it came to."""
    arguments: LabelConsistent | Adaptive = tyro.cli(Arguments, args=argv, prog="dbd craft")  # type: ignore[arg-type]
    from data_prep.dataset.manifest import open_dataset
    from dbd_dist.craft import job as jobs
    from dbd_dist.launch.local import check_place
    from dbd_dist.models.exported import read_exported
    from dbd_dist.runtime.disk import check_craft

    start = time.monotonic()
    config, out = arguments.config, Path(os.path.realpath(arguments.out))
    check_place(out, hint="choose another --out")
    dataset = open_dataset(arguments.data)
    if "truth.parquet" not in dataset.manifest.files:
        raise UserError(
            "nobody vouches for the labels of this data set", where=dataset.folder, expected="one that is not untrusted"
        )
    training = jobs.TrainingSet.read(dataset)
    jobs.check_data(config, dataset, training.labels)
    known = {k: v for k, v in dataclasses.asdict(config).items() if k not in jobs.NO_EFFECT[config.kind]}
    jobs.finished(out, config, known, training.fingerprint, overwrite=arguments.overwrite)
    if arguments.launcher == "local":
        from dbd_dist.distributed.world import check_device

        check_device(arguments.device)

    given = arguments.surrogate if isinstance(arguments, LabelConsistent) else arguments.backbone
    weights = _trained(arguments, dataset) if given is None else _weights(given, config.kind)
    exported = read_exported(weights)
    jobs.check_network(config, exported, dataset)

    made_with = jobs.settings(config, dataset, exported)

    def finished():
        return jobs.finished(out, config, made_with, training.fingerprint, overwrite=arguments.overwrite)

    artefact = finished()
    if artefact is not None and _is_main():
        print(f"{out} is finished; it stands.")
    if artefact is None:
        with _alone(out):
            artefact = finished()  # another command may have made it just now
            if artefact is None:
                job = jobs.Job(
                    config=config,
                    data=dataset.folder.resolve(),
                    weights=weights.resolve(),
                    work=jobs.work_folder(out, made_with, config),
                )
                if _is_main():
                    check_craft(config, dataset, training.labels, job.work)
                _craft(arguments, job)
                if not _is_main():
                    return 0
                artefact = jobs.finish(job, out, made_with, dataset, training)
    if _is_main():
        print(f"{summary(config.kind, artefact.evidence)}\n\n{out}: {config.kind}, {time.monotonic() - start:.0f} s")
    return 0


def summary(kind: str, evidence: Mapping[str, Any]) -> str:
    """What an artefact's evidence says, in a few lines."""
    if kind == "label-consistent":
        return (
            f"{evidence['images']:,} images of the target class; the surrogate knew "
            f"{evidence['surrogate_accuracy_before']:.1%} of them before, {evidence['surrogate_accuracy_after']:.1%} "
            f"after\nmean difference in grey levels: largest {evidence['mean_linf']:.1f}, length "
            f"{evidence['mean_l2']:.1f}"
        )
    lines = [f"{'':<29}{'before':>9}{'after':>9}   over {evidence['images']:,} images outside the target class"]
    for name in ("objective", "distance_to_own_centre", "distance_to_benign_centres"):
        before, after = evidence["before"][name], evidence["after"][name]
        lines.append(f"{name.replace('_', ' '):<29}{before:>9.4f}{after:>9.4f}")
    return "\n".join(lines)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _alone(out: Path) -> AbstractContextManager[None]:
    """Keeps other commands off an artefact and the parts of it that lie beside it; for one of torchrun's ranks."""
    if not _is_main():
        return nullcontext()
    return lock.held(out.with_name(f".{out.name}.lock"), str(out), flag="--out")


def _weights(given: Path, kind: str) -> Path:
    """The weights' file in a run folder, or the file itself."""
    if kind == "label-consistent":
        return given / "model.safetensors"
    return given if given.suffix == ".safetensors" else given / "backbone.safetensors"


def _trained(arguments: LabelConsistent | Adaptive, dataset) -> Path:
    """The weights of the network that this command trains: of its run, which goes on where it was cut off."""
    from dbd_dist.presets import PRESETS, preset
    from dbd_dist.runtime.run_folder import RunFolder

    if arguments.preset not in PRESETS:
        raise UserError(f"there is no preset {arguments.preset!r}", where="--preset", expected=", ".join(PRESETS))
    supervised = isinstance(arguments, LabelConsistent)
    config = preset(arguments.preset).config("none" if supervised else "dbd")
    compute = config.compute
    if arguments.workers is not None:
        compute = dataclasses.replace(compute, workers=arguments.workers)
    if arguments.device != "auto":
        compute = dataclasses.replace(compute, device=arguments.device)
    config = dataclasses.replace(
        config,
        stop_after=None if supervised else "simclr",
        data=dataset.folder.resolve(),
        seed=arguments.config.seed,
        compute=compute,
    )
    parent = arguments.name if arguments.name is not None else arguments.out.resolve().name
    name = f"{parent}/{'surrogate' if supervised else 'backbone'}" if parent else ""
    check_before_data(config, name, arguments.launcher)
    if _is_main():
        check_storage(arguments.storage)
    folder = RunFolder((arguments.storage / name).resolve())
    weights = _weights(folder.path, arguments.config.kind)
    if weights.exists() and weights.with_suffix(".json").exists():
        folder.claim(config, dataset)
    else:
        launch(config, arguments.storage, name, arguments.launcher)
    return weights


def _craft(arguments: LabelConsistent | Adaptive, job) -> None:
    """Run the job; what its user has to mend leaves no work folder, unless there was one to go on from."""
    from data_prep.errors import UserError

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
