"""What a run is made of: frozen dataclasses whose docstrings are the command's help, checked when they are built."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from data_prep.errors import UserError
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.models.config import ModelConfig

Config = TypeVar("Config")


def require(config: Any, prefix: str, **rules: str) -> None:
    """Check fields of `config` against rules such as "> 0", "in [0, 1]", "in (0, 1)"."""
    for name, rule in rules.items():
        value = getattr(config, name)
        if value is None:
            continue
        inside = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if inside:
            if rule.startswith("in"):
                low, high = (float(x) for x in rule[4:-1].split(","))
                inside = (low <= value if rule[3] == "[" else low < value) and (
                    value <= high if rule[-1] == "]" else value < high
                )
            else:
                operator, bound = rule.split()
                inside = value > float(bound) if operator == ">" else value >= float(bound)
        if not inside:
            raise UserError(f"{value!r} is not allowed", where=f"{prefix}.{name}", expected=f"a number {rule}")


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig:
    """Stage 1: learn the backbone without labels (Chen et al. 2020). Defaults: CIFAR-10 as DBD's authors configure
    it."""

    epochs: int = 1000
    """Epochs to train."""
    schedule_epochs: int | None = None
    """Length of the cosine schedule; `epochs` unless given. The released recipe stops a 1000-epoch schedule at 100."""
    batch: int = 512
    """Images a step over all workers; each gives two views."""
    chunk: int | None = None
    """Images a forward pass over all workers, for batches that do not fit in memory: the loss is still that of the
    whole batch, batch norm sees one chunk at a time, and the forward pass is computed twice. Default: the batch at
    once."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """lars: SGD with a rate of its own for each layer (You et al. 2017), for batches of some thousands."""
    lr: float = 0.4
    """Peak learning rate."""
    warmup_epochs: int = 0
    """Epochs of linear learning-rate warm-up (none in the released recipe)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 0.5
    """Temperature of NT-Xent."""
    symmetric: bool = True
    """Anchors from both views, as in SimCLR's paper; the released code of DBD takes the first view only."""
    augment: AugmentConfig = field(default_factory=augment.simclr)
    """How a view is made."""

    def __post_init__(self):
        require(
            self, "simclr", epochs=">= 1", schedule_epochs=">= 1", batch=">= 2", lr="> 0", warmup_epochs=">= 0",
            momentum="in [0, 1)", weight_decay=">= 0", temperature="> 0",
        )  # fmt: skip
        if self.chunk is not None and (self.chunk < 2 or self.batch % self.chunk):
            raise UserError(
                f"a batch of {self.batch} does not divide into chunks of {self.chunk}",
                where="simclr.chunk",
                expected="a divisor of simclr.batch from 2",
            )
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise UserError(
                f"the schedule of {self.schedule_epochs} epochs ends before the {self.epochs} epochs of training",
                where="simclr.schedule_epochs",
                expected=f"at least simclr.epochs = {self.epochs}",
            )


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Stage 2: a linear head on the frozen backbone, trained on all given labels with a loss that is robust to
    noise."""

    epochs: int = 10
    batch: int = 128
    """Images a step over all workers."""
    lr: float = 0.002
    """Learning rate of Adam."""
    loss: Literal["sce", "ce"] = "sce"
    """Symmetric cross-entropy (DBD), or plain cross-entropy (the article's ablation)."""
    sce_alpha: float = 0.1
    """Weight of cross-entropy in SCE."""
    sce_beta: float = 1.0
    """Weight of reverse cross-entropy in SCE."""
    freeze_batch_norm: bool = True
    """Keep the frozen backbone's batch-norm statistics; False lets them drift, as the released code does."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, "warmup", epochs=">= 1", batch=">= 2", lr="> 0", sce_alpha=">= 0", sce_beta=">= 0")
        if self.sce_alpha == 0 and self.sce_beta == 0:
            raise UserError("both weights are 0, which leaves no loss", where="warmup.sce_alpha, warmup.sce_beta")


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """The filter: one global ranking of all samples by their SCE loss; the lowest keep their labels."""

    keep: float = 0.5
    """Fraction of the samples that keep their labels."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)
    """The one draw that losses are measured on."""
    batch: int = 512
    """Images a forward pass over all workers; no influence on the result."""

    def __post_init__(self):
        require(self, "split", keep="in (0, 1)", batch=">= 1")


@dataclass(frozen=True, kw_only=True)
class MixMatchConfig:
    """Stage 3: fine-tune everything on the kept labels and the unlabelled rest (Berthelot et al. 2019)."""

    epochs: int = 190
    """The split is renewed before every epoch."""
    steps: int = 1024
    """Steps an epoch."""
    batch: int = 64
    """Labelled images a step over all workers; as many unlabelled ones, in two views each."""
    lr: float = 0.002
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant as in the released recipe; cosine anneals over all epochs."""
    continue_optimizer: bool = True
    """Go on with the Adam state of the warm-up, as the released code does."""
    temperature: float = 0.5
    """Sharpening temperature of guessed labels."""
    mix_alpha: float = 0.75
    """Mixing weights are drawn from Beta(mix_alpha, mix_alpha), one a step."""
    lambda_u: float = 15.0
    """Weight of the unlabelled loss at the end of its ramp."""
    ramp_epochs: int | None = None
    """Epochs over which lambda_u grows linearly from 0; `epochs` unless given. Counts MixMatch epochs only."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, "mixmatch", epochs=">= 1", steps=">= 1", batch=">= 2", lr="> 0", temperature="> 0", mix_alpha="> 0",
            lambda_u=">= 0", ramp_epochs=">= 1",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """No defence: plain training on the given labels (the baseline of DBD's tables)."""

    epochs: int = 200
    batch: int = 128
    """Images a step over all workers."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["step", "cosine"] = "step"
    """step: times 0.1 at the milestones. cosine: to zero over all epochs."""
    milestones: tuple[int, ...] = (100, 150)
    """Epochs after which the step schedule divides the learning rate by ten."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, "supervised", epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0"
        )  # fmt: skip
        if any(m < 1 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"{self.milestones} are no milestones",
                where="supervised.milestones",
                expected="whole numbers from 1, each larger than the one before",
            )


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
    min_workers: int | None = None
    """Go on with fewer workers, down to this many, while nodes are missing. Default: wait for all."""

    def __post_init__(self):
        require(
            self, "compute", workers=">= 1", threads="in [1, 1024]", resident_gib=">= 0", checkpoint_s=">= 0",
            checkpoint_steps=">= 1", patience_s=">= 0", min_workers=">= 1", stall_s=">= 0",
        )  # fmt: skip
        if self.min_workers is not None and (self.workers is None or self.min_workers > self.workers):
            raise UserError(
                f"{self.min_workers} is not between 1 and compute.workers",
                where="compute.min_workers",
                expected="at most compute.workers, which has to be given too",
            )
        if self.stage is not None and not self.stage.is_absolute():
            raise UserError(f"{str(self.stage)!r} is relative", where="compute.stage", expected="an absolute path")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: a data set, a method, a seed, and every number on the way."""

    preset: str = "custom"
    """Name of the preset that this configuration started from."""
    method: Literal["dbd", "none"] = "dbd"
    """dbd: the three-stage defence. none: plain supervised training, no defence."""
    data: Path | None = None
    """Dataset folder, as `dbd prepare` writes it. Default: the preset's own, prepared on first use."""
    seed: int = 0
    """Seed of weights, order, augmentation and mixing."""
    model: ModelConfig = field(default_factory=ModelConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    mixmatch: MixMatchConfig = field(default_factory=MixMatchConfig)
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluate_every: int = 5
    """Measure accuracy and attack success every so many epochs of fine-tuning or baseline, for the curves; 0: at
    the end only."""
    stop_after: Literal["simclr", "warmup"] | None = None
    """Stop after this stage and keep its result for later runs, e.g. one pretraining for a whole sweep."""

    def __post_init__(self):
        require(self, "config", evaluate_every=">= 0", seed=">= 0")
        stages = ("simclr", "warmup", "split", "mixmatch", "supervised")
        normalisations = {name: (getattr(self, name).augment.mean, getattr(self, name).augment.std) for name in stages}
        for name, theirs in normalisations.items():
            if theirs != normalisations["supervised"]:
                raise UserError(
                    f"mean and std {theirs} differ from {normalisations['supervised']} of supervised.augment",
                    where=f"{name}.augment",
                    expected="one normalisation for all stages of a run",
                )

    def check_image_px(self, image_px: int) -> None:
        """What depends on the size of the images.

        Raises:
            UserError: a padding reaches across the image, which no reflection fills.
        """
        for stage in ("supervised",) if self.method == "none" else ("simclr", "warmup", "split", "mixmatch"):
            config: AugmentConfig = getattr(self, stage).augment
            if config.crop == "pad" and config.pad_px >= image_px:
                raise UserError(
                    f"pad_px is {config.pad_px} for images of {image_px} px",
                    where=f"{stage}.augment.pad_px",
                    expected=f"0 to {image_px - 1}",
                )

    @property
    def normalise(self) -> AugmentConfig:
        """How test images are normalised: as in every stage."""
        return augment.none(mean=self.supervised.augment.mean, std=self.supervised.augment.std)


# --------------------------------------------------------------------------------------------------------------
# JSON


def to_dict(config: Any, *, every_field: bool = False) -> Any:
    """A config as plain JSON values: dataclasses become objects, tuples lists, paths strings.

    Fields with the metadata `omit_default` are left out at their default, and so are those that the config lists in an
    attribute `unused`: hashes made before there was such a field stay valid. `every_field` keeps them.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            f.name: to_dict(getattr(config, f.name), every_field=every_field)
            for f in dataclasses.fields(config)
            if every_field or not _is_omitted(config, f)
        }
    if isinstance(config, tuple | list):
        return [to_dict(v, every_field=every_field) for v in config]
    return str(config) if isinstance(config, Path) else config


def _is_omitted(config: Any, field: dataclasses.Field) -> bool:
    at_default = field.metadata.get("omit_default", False) and getattr(config, field.name) == field.default
    return at_default or field.name in getattr(config, "unused", ())


def from_dict(kind: type[Config], values: Any, where: str = "config") -> Config:
    """The inverse of `to_dict`; fields that are missing take their defaults.

    Raises:
        UserError: an unknown field, or a value of the wrong type, named with its place.
    """
    if not isinstance(values, dict):
        raise UserError(f"{values!r} is not an object", where=where, expected=f"the fields of {kind.__name__}")
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r}", where=where, expected=", ".join(hints))
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return _value(arguments[0], value, where)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{value!r} is not allowed", where=where, expected=", ".join(map(repr, arguments)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{value!r} is not a list", where=where)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise UserError(f"{value!r} has {len(value)} values", where=where, expected=f"{len(kinds)} values")
        return tuple(_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    if kind is Path and isinstance(value, str):
        try:
            odd = b"\0" in os.fsencode(value)
        except UnicodeEncodeError:
            odd = True
        if odd:
            raise UserError(f"{value!r} is no path", where=where)
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{value!r} is a {type(value).__name__}", where=where, expected=f"a value of type {kind.__name__}"
        )
    return value


def digest(values: Any) -> str:
    """A short stable hash of JSON values or configs; 1 and 1.0 are the same number."""
    text = json.dumps(_numbers(to_dict(values)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(values: Any) -> Any:
    """JSON values with whole floats as ints: a field of type float may have been given either."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_numbers(value) for value in values]
    return int(values) if isinstance(values, float) and values.is_integer() else values
