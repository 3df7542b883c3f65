"""What a stage is: settings, the names of what it reads and gives, and one function."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from data_prep.errors import UserError
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.fields import to_dict

if TYPE_CHECKING:
    from dbd_dist.models.config import ModelConfig
    from dbd_dist.stages.context import Context


AnyStage = TypeVar("AnyStage")


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """What a stage writes, in bytes."""

    checkpoint: int = 0
    """The largest of its checkpoints."""
    kept: int = 0
    """What it hands on, stored for other runs."""


@dataclass(frozen=True, kw_only=True)
class NetworkBytes:
    """Sizes of the networks' weights and of a table over the training set, in bytes."""

    backbone: int
    contrastive: int
    """Backbone and projection head."""
    classifier: int
    """Backbone and linear head."""
    head: int
    split: int


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of training. Its fields are its settings, and the flags ``--NAME.FIELD`` of `dbd train`."""

    name: ClassVar[str]
    """Names the stage in flags, metrics, checkpoints and folders."""
    title: ClassVar[str]
    """For people."""
    reads: ClassVar[tuple[str, ...]] = ()
    """What it needs that earlier stages give."""
    gives: ClassVar[tuple[str, ...]]
    """What it hands on: "backbone" (weights without labels), "model" (weights of the classifier), "optimizer",
    "split", "flagged" (see `stages.flagged`), "measures" (plain values by name, for result.json), or names of its
    own."""
    evaluates: ClassVar[bool] = False
    """Its model is a classifier in training, worth measuring between epochs."""
    trains: ClassVar[bool] = True
    """It has epochs. One that has none only `offers` what follows from its settings."""
    on_clean: ClassVar[bool] = False
    """It trains on `context.clean`, the clean images set aside, and its `batch` is of those. Its method has to say
    `needs_clean`."""
    kept_when_last: ClassVar[bool] = False
    """What it gives is stored for other runs also where it is a method's last stage: other methods begin with it."""
    revision: ClassVar[int] = 0
    """Counted up when a change of the code changes what the stage computes: what was stored before is not used then."""

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        """The settings that follow from those of a preset's own stages, by name; None where they do not.

        A variant of a stage that the preset has (a subclass, under the same name) takes its settings, but for the
        fields that it declares itself.
        """
        found = stages.get(cls.name)
        if found is None or not issubclass(cls, type(found)):
            return None
        own = inspect.get_annotations(cls)
        return cls(**{f.name: getattr(found, f.name) for f in fields(found) if f.name not in own})

    def offers(self) -> dict[str, Any]:
        """What the stage gives that follows from its settings alone, by name; never stored."""
        return {}

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        """Do the stage's work; every rank calls it.

        Args:
            inputs: what earlier stages gave, by name; `reads` are there.
            resume: the state that the stage reported last, to continue from; None at its beginning.

        Returns:
            What it `gives`, by name: state dicts and tensors on the CPU, or plain values.
        """
        raise NotImplementedError(f"{type(self).__name__}.run")

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        """Refuse what does not fit the data set or the number of workers.

        Args:
            images: in the set that it trains on: the training set, or the clean images (`on_clean`).
            image_px: side of an image.
            others: all stages of the method.

        Raises:
            UserError
        """
        self.check_image_px(image_px)
        batch = getattr(self, "batch", None)
        if self.trains and batch is not None:
            check_batch(self.name, batch, workers, images, "clean images" if self.on_clean else "training images")

    def check_network(self, model: ModelConfig) -> None:
        """Refuse a network that the stage cannot train.

        Raises:
            UserError
        """

    def check_image_px(self, image_px: int) -> None:
        """Refuse an augmentation that does not fit the images.

        Raises:
            UserError: a padding reaches across the image, which no reflection fills.
        """
        augment = getattr(self, "augment", None)
        if isinstance(augment, AugmentConfig) and augment.crop == "pad" and augment.pad_px >= image_px:
            raise UserError(
                f"pad_px is {augment.pad_px} for images of {image_px} px",
                where=f"{self.name}.augment.pad_px",
                expected=f"0 to {image_px - 1}",
            )

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        """What the stage writes; a plugin that does not say is taken to write as much as fine-tuning does."""
        if not self.trains:
            return StageBytes()
        return StageBytes(checkpoint=3 * networks.classifier + networks.split, kept=3 * networks.classifier)

    def key_values(self) -> Any:
        """What the stage's hash covers of its settings."""
        values = to_dict(self)
        return values if not self.revision else [self.revision, values]


def check_batch(name: str, batch: int, workers: int, limit: int, what: str) -> None:
    """Refuse a batch that the images or the workers do not allow.

    Raises:
        UserError
    """
    if batch > limit:
        raise UserError(
            f"a batch of {batch} is larger than the data set: {limit} {what}",
            where=f"{name}.batch",
            expected=f"at most {limit}",
        )
    if batch % workers or batch // workers < 2:
        raise UserError(
            f"a batch of {batch} cannot be shared equally by {workers} workers",
            where=f"{name}.batch",
            expected=f"a multiple of {workers}, at least {2 * workers}",
        )


def find_stage(stages: Sequence[Stage], kind: type[AnyStage]) -> AnyStage | None:
    """The first of `stages` of that kind; None where there is none."""
    return next((stage for stage in stages if isinstance(stage, kind)), None)
