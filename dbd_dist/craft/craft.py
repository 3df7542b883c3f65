"""What every crafted attack is: a frozen config, work that ranks share, and the attack that `dbd prepare` applies."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from data_prep.artefacts import FINGERPRINT_IMAGES, fingerprint
from data_prep.attacks.crafted import Crafted
from data_prep.beton.ffcv import BetonStream
from data_prep.dataset.manifest import Dataset
from data_prep.errors import UserError
from data_prep.plan import check_target
from dbd_dist.distributed.world import World
from dbd_dist.fields import require
from dbd_dist.models.exported import Exported

Network = Callable[[Tensor], Tensor]
"""Float images in grey levels (B, 3, H, W) -> logits (B, K) of a surrogate, or pooled features (B, D) of a backbone;
differentiable."""


@dataclass(frozen=True)
class TrainingSet:
    """The clean training images that an attack is crafted for."""

    dataset: Dataset
    labels: np.ndarray
    """int64 (n,)."""
    fingerprint: str
    """What the artefact is recognised by."""

    @classmethod
    def read(cls, dataset: Dataset) -> TrainingSet:
        count = dataset.manifest.counts["train"]
        with BetonStream(dataset.train, expect_count=count, expect_px=dataset.manifest.image_px) as stream:
            first = np.arange(min(count, FINGERPRINT_IMAGES))
            images, _, _ = next(stream.batches(first, len(first)))
            return cls(dataset, stream.labels, fingerprint(stream.labels, images.copy()))

    @property
    def image_px(self) -> int:
        return self.dataset.manifest.image_px

    @property
    def num_classes(self) -> int:
        return self.dataset.manifest.num_classes


@dataclass(frozen=True, kw_only=True)
class Work:
    """What each rank is given to make its part of an artefact."""

    data: TrainingSet
    exported: Exported
    """The surrogate or backbone."""
    world: World
    folder: Path
    """Of finished parts, the same for all ranks."""
    tick: Callable[[str, int, int, int, int], None] = lambda *_: None
    """Progress: (what, part, parts, step, steps)."""
    note: Callable[[dict[str, Any]], None] = lambda _: None
    """Figures to show beside it."""

    @functools.cached_property
    def network(self) -> Network:
        """The network on this rank's device, in eval mode, its weights frozen."""
        model = self.exported.build(self.world.device)
        return lambda grey_BCHW: model(self.exported.inputs(grey_BCHW))

    def check_finite(self, craft: Craft, failed: Tensor) -> None:
        """Raise a UserError on every rank where there was one on any; every rank calls it.

        Args:
            craft: at work.
            failed: int64 scalar, the first step of this rank whose loss or gradient was not finite; 0 for none.
        """
        steps = [step for step in self.world.gather(failed.view(1)).tolist() if step]
        if steps:
            raise UserError(
                "the loss or its gradient is not finite",
                where=f"{craft.name}, step {min(steps)}",
                hint=f"take smaller steps, or another --{craft.network}",
            )


@dataclass(frozen=True, kw_only=True)
class Craft(ABC):
    """An attack that needs a trained model. Its fields are the flags of `dbd craft NAME`, its docstring the help.

    `PerImage` perturbs images one by one, `OptimisedTrigger` optimises one trigger for all; an attack derives from one
    of them, or says itself how it is made.
    """

    name: ClassVar[str]
    """That of the attack."""
    attack: ClassVar[type[Crafted]]
    """Applies the artefact in `dbd prepare`; gives the name, and the layout of the arrays."""
    network: ClassVar[Literal["surrogate", "backbone"]]
    """What it is crafted with. surrogate: a classifier of the data set's classes. backbone: a self-supervised one."""
    no_effect: ClassVar[tuple[str, ...]] = ()
    """Settings that change no artefact."""

    target: int = 3
    """The target class, from 0; `dbd prepare` needs the same."""
    batch: int = 128
    """Images that are worked on at a time."""
    seed: int = 0
    """Seed of all draws, and of the network where it is trained here."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "attack"):
            cls.name = cls.attack.name

    def __post_init__(self):
        require(self, "craft", target=">= 0", batch=">= 1", seed=">= 0")

    def check(self, data: TrainingSet) -> None:
        """Refuse settings that do not fit the data, with a UserError."""
        check_target(self.target, data.dataset.manifest.class_names)

    def check_workers(self, workers: int) -> None:
        """Refuse a number of workers that cannot share the work, with a UserError."""
        return

    @abstractmethod
    def disk_bytes(self, data: TrainingSet) -> int:
        """What the parts and the artefact take at most."""

    @abstractmethod
    def make(self, work: Work) -> None:
        """Write what is missing in `work.folder`, each file atomically. Every rank calls it, and again after a crash;
        a UserError is raised on every rank."""

    @abstractmethod
    def collect(self, data: TrainingSet, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The artefact's arrays, and figures of what they do (JSON values), from the finished parts."""

    @abstractmethod
    def summary(self, evidence: Mapping[str, Any]) -> str:
        """Those figures in a few lines."""
