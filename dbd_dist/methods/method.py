"""What a method is: a frozen dataclass whose fields are its stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from torch import nn

from data_prep.errors import UserError
from dbd_dist.models.config import ModelConfig
from dbd_dist.stages.stage import Stage

AnyMethod = TypeVar("AnyMethod", bound="Method")

HOLDOUT_CLEAN = 0.05
"""Share of clean images that the papers of defences which need some work with."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to train on data that may be poisoned. Its fields are stages, in the order in which they run."""

    name: ClassVar[str]
    """Names the method in ``--method``, folders and results."""
    title: ClassVar[str]
    """For people."""
    defends: ClassVar[bool] = True
    """Is meant to keep backdoors out; what does not is the baseline of every table."""
    needs_clean: ClassVar[bool] = False
    """Needs clean images of the defender's own: the data set has to hold some (``dbd prepare --holdout-clean``), stages
    have them as ``context.clean``, and tables mark the method."""
    defaults: ClassVar[Mapping[str, Mapping[str, Stage]]] = {}
    """Stages for presets that have none of that name: preset -> field -> stage; "*" is for every preset where the
    stage does not derive them from the preset (`Stage.from_preset`)."""

    def __post_init__(self):
        self.check_names()

    def stages(self) -> tuple[Stage, ...]:
        """The stages in order."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def titles(self) -> dict[str, str]:
        """Titles by name, of the method and its stages: a run records them for its reports."""
        return {self.name: self.title, **{stage.name: stage.title for stage in self.stages()}}

    def trained(self) -> tuple[Stage, ...]:
        """The stages that have epochs, in order."""
        return tuple(stage for stage in self.stages() if stage.trains)

    @classmethod
    def stage_kinds(cls) -> dict[str, type[Stage]]:
        """The classes of the stages, by the names of the fields."""
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in dataclasses.fields(cls)}

    def at_test_time(self, model: nn.Module) -> nn.Module:
        """The classifier that is measured and used: `model` (images (B, 3, H, W) -> logits), perhaps with a change of
        its input. Measures between epochs are of the model without it: other methods may share the stage."""
        return model

    @property
    def changes_input(self) -> bool:
        """Is there something that `at_test_time` does?"""
        return type(self).at_test_time is not Method.at_test_time

    def check_names(self) -> None:
        """Hold what stages read against what earlier ones give.

        Raises:
            UserError: a stage reads what nobody gives, two stages have one name, there is no model at the end, or a
                stage needs clean images and the method does not say so.
        """
        given: set[str] = set()
        names = [stage.name for stage in self.stages()]
        if len(names) != len(set(names)):
            raise UserError(f"two stages have one name: {', '.join(names)}", where=f"method {self.name}")
        for stage in self.stages():
            missing = [name for name in stage.reads if name not in given]
            if missing:
                raise UserError(
                    f"the stage {stage.name} reads {', '.join(missing)}, which no stage before it gives",
                    where=f"method {self.name}",
                    expected=f"one of {', '.join(sorted(given))}" if given else "a stage before it that gives it",
                )
            given |= set(stage.gives)
        if not self.needs_clean and any(stage.on_clean for stage in self.stages()):
            raise UserError(
                "a stage trains on clean images, and the method does not say needs_clean", where=f"method {self.name}"
            )
        if "model" not in given:
            raise UserError("no stage gives a model", where=f"method {self.name}")

    @classmethod
    def network(cls, model: ModelConfig) -> ModelConfig:
        """The network that the method trains where a preset has `model`."""
        return model

    def check_clean(self, counts: Mapping[str, int], folder: Path) -> None:
        """Refuse a data set without the clean images that the method needs.

        Args:
            counts: images of each split (`Manifest.counts`).
            folder: of the data set.

        Raises:
            UserError
        """
        if self.needs_clean and "holdout" not in counts:
            raise UserError(
                f"{self.title} needs clean images, and this data set has set none aside",
                where=folder,
                expected=f"a data set made with `dbd prepare ... --holdout-clean {HOLDOUT_CLEAN:g}`",
                hint="prepare it anew with that flag: those images are then no part of the training set",
            )

    @classmethod
    def from_stages(cls: type[AnyMethod], stages: Mapping[str, Stage], preset: str) -> AnyMethod:
        """The method with the settings that a preset has for its stages.

        Args:
            stages: of the preset, by name.
            preset: its name.

        Raises:
            UserError: neither the preset nor the method has settings for one of the stages.
        """
        own, common = cls.defaults.get(preset, {}), cls.defaults.get("*", {})
        chosen: dict[str, Any] = {}
        for name, kind in cls.stage_kinds().items():
            found = stages.get(name)
            if not isinstance(found, kind):
                found = own.get(name) or kind.from_preset(stages) or common.get(name)
            if found is None:
                raise UserError(
                    f"the preset {preset} has no settings for {name}, a stage of {cls.name}",
                    where="--method",
                    expected=f"a method of the stages {', '.join(stages)}",
                    hint="choose another preset, or give the method's class `defaults` for this one",
                )
            chosen[name] = found
        return cls(**chosen)
