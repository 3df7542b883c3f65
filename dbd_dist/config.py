"""What a run is made of: a method, a network, a data set, a seed, and how it computes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.errors import UserError
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.fields import FLAT, from_dict, parse, require, to_dict
from dbd_dist.methods import DBD, METHODS, Method
from dbd_dist.models.config import ModelConfig
from dbd_dist.stages import STAGES
from dbd_dist.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how a run computes; none of it is part of the method."""

    workers: int | None = None
    """Processes that train together, one device each. Default: one a GPU, or one on a machine without."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is any, else the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bfloat16 autocast on CUDA and on CPUs with the instructions for it, else float32."""
    threads: int | None = None
    """Threads of a worker on the CPU. Default: the machine's cores over the workers on it."""
    sync_bn: bool = True
    """Batch-norm statistics over the global batch; False: over each worker's part."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the network. auto: on CUDA, where there is what it needs (Triton and a C compiler)."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Record the MixMatch step once and replay it, which spares hundreds of launches a step. auto and on: on CUDA, with
    one worker."""
    resident_gib: float = 16.0
    """Training images up to this size (decoded, GiB a worker) stay on the device; larger sets stream from disk."""
    stage: Path | None = None
    """Folder on each node's own disk that the data set is copied to once a node, and read from; for shared storage."""
    checkpoint_s: float = 0.0
    """Seconds between two checkpoints, at least; they are saved when an epoch ends. 0: after every epoch."""
    checkpoint_steps: int | None = None
    """Save a checkpoint also inside epochs, every so many steps; for epochs that are too long to lose."""
    patience_s: float = 120.0
    """How long to try again, in seconds, while storage is full, read-only or gone, before the run ends."""
    mirror: str | None = None
    """A second place for checkpoints, e.g. s3://BUCKET/FOLDER or file:///FOLDER: copied there in the background, and
    fetched from there where they are missing here."""
    stall_s: float = 900.0
    """A worker that makes no step for so many seconds is taken to hang: it leaves its stacks in the run folder and is
    ended. Compiling, one checkpoint and reading the data set once have to fit in; 0: never."""
    keep_ray_results: bool = True
    """Keep Ray Train's own folder of the run (some KB below RUN/ray), for `ray.train.Result` and Tune; False: Ray gets
    the metrics only. A run with --launcher local has none."""
    defender_metrics: bool = field(default=False, metadata={"omit_default": True})
    """Also measure what can be known without the truth: agreement with withheld labels (--mixmatch.withhold), stability
    of the split, loss gap, agreement of nearest neighbours."""
    min_workers: int | None = None
    """Go on with fewer workers, down to this many, while nodes are missing. Default: wait for all."""
    cpus_per_worker: int | None = None
    """CPUs to ask Ray for, for each worker, and its threads. Default: an equal part of all that there are."""
    gpus_per_worker: float = 1.0
    """GPUs to ask Ray for, for each worker; 0.5 lets two runs of one worker each share a GPU."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """PACK: workers on as few nodes as they fit on; SPREAD: on as many; STRICT_: so or not at all."""
    labels: str | None = None
    """Only nodes with these labels of Ray's, e.g. zone=a,disk=nvme (`ray start --labels`)."""
    wait_s: float | None = None
    """How long to wait in seconds, also as --wait-s, while the cluster is busy. Default: for ever."""
    log: tuple[str, ...] = ()
    """Where metrics go too, also as --log: wandb, mlflow, or a plugin's name."""
    profile: int | None = None
    """Trace so many steps of each stage, also as --profile, to RUN/profile; for ui.perfetto.dev."""

    def __post_init__(self):
        require(
            self, "compute", workers=">= 1", threads="in [1, 1024]", resident_gib=">= 0", checkpoint_s=">= 0",
            checkpoint_steps=">= 1", patience_s="in [0, 1e7]", min_workers=">= 1", stall_s="in [0, 1e7]",
            cpus_per_worker=">= 1", gpus_per_worker="in (0, 64]", wait_s=">= 0", profile="in [1, 10000]",
        )  # fmt: skip
        if self.gpus_per_worker > 1 and not float(self.gpus_per_worker).is_integer():
            raise UserError(
                f"{self.gpus_per_worker} is not allowed",
                where="compute.gpus_per_worker",
                expected="a whole number, or a part of 1",
            )
        if self.gpus_per_worker < 1 and self.workers not in (None, 1):
            raise UserError(  # NCCL refuses two ranks on one GPU
                f"{self.workers} workers cannot train together on parts of a GPU",
                where="compute.gpus_per_worker",
                expected="1, or --compute.workers 1",
            )
        self.node_labels  # noqa: B018
        if self.min_workers is not None and (self.workers is None or self.min_workers > self.workers):
            raise UserError(
                f"{self.min_workers} is not between 1 and compute.workers",
                where="compute.min_workers",
                expected="at most compute.workers, which has to be given too",
            )
        if self.stage is not None and not self.stage.is_absolute():
            raise UserError(f"{str(self.stage)!r} is relative", where="compute.stage", expected="an absolute path")

    @property
    def node_labels(self) -> dict[str, str]:
        """`labels` by name.

        Raises:
            UserError: they are not NAME=VALUE with commas between them.
        """
        pairs = [part.strip().partition("=") for part in self.labels.split(",")] if self.labels is not None else []
        if not all(name and equals and value for name, equals, value in pairs):
            raise UserError(f"{self.labels!r} is not allowed", where="compute.labels", expected="NAME=VALUE,...")
        return {name: value for name, _, value in pairs}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: a data set, a method, a seed, and every number on the way."""

    preset: str = "custom"
    """Name of the preset that this configuration started from."""
    method: Annotated[Method, FLAT] = field(default_factory=DBD)
    data: Path | None = None
    """Dataset folder, as `dbd prepare` writes it. Default: the preset's own, prepared on first use."""
    seed: int = 0
    """Seed of weights, order, augmentation and mixing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluate_every: int = 5
    """Measure accuracy and attack success every so many epochs of fine-tuning or baseline, for the curves; 0: at
    the end only."""
    stop_after: str | None = None
    """Stop after this stage and keep its result for later runs, e.g. one pretraining for a whole sweep."""

    def __post_init__(self):
        require(self, "config", evaluate_every=">= 0", seed=">= 0")
        self.normalise  # noqa: B018
        if self.data is not None:  # whoever reads the configuration later has another current folder
            object.__setattr__(self, "data", self.data.absolute())
        for stage in self.method.trained():
            if getattr(stage, "epochs", 1) == 0 and self.model.weights is None:
                raise UserError(
                    "no epoch of training, and no weights to take in its place",
                    where=f"{stage.name}.epochs",
                    expected="at least 1, or --model.weights FILE",
                )
        stops = [stage.name for stage in self.method.trained()[:-1]]
        if self.stop_after is not None and self.stop_after not in stops:
            raise UserError(
                f"{self.stop_after!r} is not a stage of {self.method.name} that another follows",
                where="--stop-after",
                expected=", ".join(stops) or "nothing: this method has one stage",
            )

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that run, in order: all, or those up to `stop_after`."""
        stages = self.method.stages()
        names = [stage.name for stage in stages]
        return stages[: names.index(self.stop_after) + 1] if self.stop_after else stages

    def check_image_px(self, image_px: int) -> None:
        """What depends on the size of the images.

        Raises:
            UserError: a padding reaches across the image, which no reflection fills.
        """
        for stage in self.stages:
            stage.check_image_px(image_px)

    @property
    def normalise(self) -> AugmentConfig:
        """How test images are normalised: as in every stage.

        Raises:
            UserError: stages differ in it.
        """
        found = {s.name: s.augment for s in self.method.stages() if hasattr(s, "augment")}  # type: ignore[attr-defined]
        (first, theirs), *others = found.items() or [("no stage", augment.none())]
        for name, other in others:
            if (other.mean, other.std) != (theirs.mean, theirs.std):
                raise UserError(
                    f"mean and std {(other.mean, other.std)} differ from {(theirs.mean, theirs.std)} of {first}",
                    where=f"{name}.augment",
                    expected="one normalisation for all stages of a run",
                )
        return augment.none(mean=theirs.mean, std=theirs.std)

    def to_dict(self, *, every_field: bool = False) -> dict[str, Any]:
        """Plain JSON values: the method by its name, and its stages beside the other parts. See `fields.to_dict`."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "method"}
        values = {name: to_dict(value, every_field=every_field) for name, value in shared.items()}
        return {**values, "method": self.method.name, **to_dict(self.method, every_field=every_field)}

    @classmethod
    def from_dict(cls, values: Any, where: str = "config") -> TrainConfig:
        """The inverse of `to_dict`; fields that are missing take their defaults. Stages of other methods, which early
        versions wrote too, are left out.

        Raises:
            UserError: an unknown field, or a value of the wrong type, named with its place.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("method", "dbd"), str):
            raise UserError(f"{values!r} is not an object", where=where, expected="the fields of a configuration")
        values = dict(values)
        kind = METHODS.find(values.pop("method", "dbd"), where=f"{where}.method")
        names = {f.name for f in fields(kind)}
        own = {name: values.pop(name) for name in list(values) if name in names}
        shared = {name: value for name, value in values.items() if name not in STAGES}
        return cls(method=from_dict(kind, own, where), **parse(cls, shared, where))


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with some fields replaced: ``override(config, {"split.keep": 0.4})``. Checked like any configuration.

    Raises:
        UserError: there is no such field, or the value is not allowed.
    """
    backbone = values.get("model.backbone")
    if isinstance(backbone, str):  # a preset's depths are those of its own backbone
        config = replace(config, model=config.model.with_backbone(backbone))
    content = config.to_dict(every_field=True)
    for dotted, value in values.items():
        place: Any = content
        *parents, last = dotted.split(".")
        for parent in parents:
            place = _inside(place, parent)
        if _inside(place, last) is _NOTHING:
            names = field_names(content)
            near = difflib.get_close_matches(dotted, names, n=1)
            raise UserError(
                "there is no such field",
                where=dotted,
                expected=f"{', '.join(content)}, each with its own fields",
                hint=f"did you mean {near[0]}?" if near else None,
            )
        place[int(last) if isinstance(place, list) else last] = value
    return TrainConfig.from_dict(content)


def field_names(content: Any) -> list[str]:
    """The dotted names of all values in a configuration's plain values; places of a list are numbered from 0."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found: list[str] = []
    for name, value in items:
        below = [f"{name}.{inner}" for inner in field_names(value)]
        found += below if isinstance(value, dict) else [str(name), *below]
    return found


_NOTHING = object()


def _inside(place: Any, name: str) -> Any:
    """What a dict holds by its name, or a list by its number."""
    if isinstance(place, list):
        return place[int(name)] if name.isdecimal() and int(name) < len(place) else _NOTHING
    return place.get(name, _NOTHING) if isinstance(place, dict) else _NOTHING
