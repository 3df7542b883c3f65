"""What every attack is: a frozen config that answers a few questions, and pure functions on pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from data_prep.attacks.protocols import ProtocolName
from data_prep.errors import UserError
from data_prep.images import decode_image
from data_prep.io.hashes import sha256_file

Trigger = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(uint8 (B, H, W, 3), int64 (B,) sample indices) -> uint8 (B, H, W, 3), a new array. What it draws depends on the
indices and a seed of the attack's own, never on the batch."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Which samples are poisoned, what label they are given, and what is done to pixels; here all-to-one with
    changed labels."""

    name: ClassVar[str]
    """Names the attack in folders, manifests and on the command line."""
    clean_label: ClassVar[bool] = False
    """Poisoned images are of the target class and keep their label."""
    crafted: ClassVar[bool] = False
    """Needs an artefact of `dbd craft`."""
    revision: ClassVar[int] = 1
    """Counted up when the same settings make other images, so that a data set of before is not taken for a new one."""

    @property
    def poisons(self) -> bool:
        """Is anything poisoned?"""
        return True

    @property
    def has_target(self) -> bool:
        """Is there one label that all triggered images aim at?"""
        return True

    @property
    def covers_per_poisoned(self) -> float:
        """Cover images for each poisoned one: they carry a trigger too and keep their label."""
        return 0.0

    def with_protocol(self, protocol: ProtocolName) -> Attack:
        """This attack, with the numbers of its own that a protocol decides."""
        return self

    def eligible(self, labels: np.ndarray, target: int) -> np.ndarray:
        """Which samples may be poisoned: bool (n,) for int (n,) true labels."""
        return labels == target if self.clean_label else labels != target

    def relabel(self, labels: np.ndarray, target: int, num_classes: int) -> np.ndarray:
        """The labels that triggered images aim at, and that poisoned samples are given: int (n,) for int (n,) true
        labels in 0 to num_classes - 1. Each depends on its true label alone."""
        return np.full_like(labels, target)

    def train_trigger(self, image_px: int) -> Trigger:
        """What is done to poisoned training images of image_px x image_px."""
        raise AssertionError(f"{type(self).__name__} poisons nothing")

    def cover_trigger(self, image_px: int) -> Trigger:
        """What is done to cover images; as to poisoned ones unless an attack says otherwise."""
        return self.train_trigger(image_px)

    def test_trigger(self, image_px: int) -> Trigger:
        """What is done to test images; that of training unless an attack says otherwise."""
        return self.train_trigger(image_px)

    def describe(self) -> dict[str, Any]:
        """The config as JSON values; a trigger image is described by its sha256 too, so that an edited
        one is another attack."""
        described: dict[str, Any] = {"kind": self.name}
        if self.revision > 1:
            described["revision"] = self.revision
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                described[f"{field.name}_sha256"] = self._sha256(value)
                value = value.name
            described[field.name] = list(value) if isinstance(value, tuple) else value
        return described

    def _sha256(self, path: Path) -> str:
        try:
            return sha256_file(path)
        except OSError as error:
            raise UserError(f"cannot read the trigger image ({error.strerror})", where=path) from error

    @property
    def slug(self) -> str:
        """The attack and what differs from its defaults, e.g. wanet-strength1, for folder names."""
        parts = [self.name]
        for field in fields(self):
            value = getattr(self, field.name)
            # what has no default is an artefact: made for each seed, and identified by its hash in the manifest
            if field.default is MISSING or value == field.default:
                continue
            if isinstance(value, Path):
                parts.append(value.stem)
            elif isinstance(value, str):
                parts.append(value)
            elif isinstance(value, tuple):
                parts.append(field.name.replace("_", "-") + "x".join(f"{v:g}" for v in value))
            elif isinstance(value, int):  # all of its digits: two seeds are two names
                parts.append(f"{field.name.replace('_', '-')}{value:d}")
            else:
                parts.append(f"{field.name.replace('_', '-')}{value:g}")
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class NoAttack(Attack):
    """No poison: the images and labels as they are."""

    name: ClassVar[str] = "clean"

    @property
    def poisons(self) -> bool:
        return False

    @property
    def has_target(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class PoisonLabel(Attack):
    """An attack that changes labels: to one target, or each class to the next."""

    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    """all-to-one: poisoned images of every other class are given the target label. all-to-all: poisoned images of
    class y are given y + 1 (the last class 0), and there is no target."""

    @property
    def has_target(self) -> bool:
        return self.mapping == "all-to-one"

    def eligible(self, labels: np.ndarray, target: int) -> np.ndarray:
        return super().eligible(labels, target) if self.has_target else np.ones(len(labels), dtype=bool)

    def relabel(self, labels: np.ndarray, target: int, num_classes: int) -> np.ndarray:
        return super().relabel(labels, target, num_classes) if self.has_target else (labels + 1) % num_classes


def check_seed(value: int, where: str) -> None:
    """Raises:
    UserError: below 0.
    """
    if value < 0:
        raise UserError(f"seed {value} is negative", where=where, expected="0 or more")


def sample_rng(seed: int, index: int) -> np.random.Generator:
    """The generator of one sample's own draws."""
    return np.random.default_rng([seed, index])


def trigger_image(path: Path, side: int | None, *, resize: bool, hint: str) -> np.ndarray:
    """An opaque image file as a square: uint8 (side, side, 3).

    Args:
        path: of the file.
        side: in pixels; None takes the file's own.
        resize: whether a file of another size is resized (bilinear) rather than refused: a trigger that is bent or
            blurred on the way is another trigger.
        hint: what to tell the user of a file that is refused.

    Raises:
        UserError: unreadable, with an alpha channel, or of another size.
    """
    # what an alpha channel means in a trigger would be a guess
    image = Image.fromarray(decode_image(path, where=str(path), opaque=True, what="trigger image"))
    wanted = (side, side) if side is not None else (image.width, image.width)
    if image.size != wanted:
        if side is None or not resize:
            raise UserError(
                f"the trigger image has {image.width} x {image.height} px",
                where=path,
                expected=f"{side} x {side} px, as the images have" if side is not None else "a square",
                hint=hint,
            )
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    return np.array(image, dtype=np.uint8)
