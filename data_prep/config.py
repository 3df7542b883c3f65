"""What `prepare` is asked for, checked when it is built."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.attacks import PROTOCOLS, Attack, NoAttack, Protocol, ProtocolName
from data_prep.beton.jpeg import QUALITY, SUBSAMPLING
from data_prep.errors import UserError
from data_prep.plan import check_rate
from data_prep.sources import Source
from data_prep.threads import available_cores


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Make a dataset folder: images from a source, some of them poisoned by an attack."""

    source: Source
    attack: Attack = field(default_factory=NoAttack)
    protocol: ProtocolName = "paper"
    """Decides rate, target, Blended's alpha and how samples are chosen, where they are not given. paper: target 3,
    exactly 5 % (clean-label attacks 2.5 %), alpha 0.1. released: the same, but a coin is tossed for every image, as in
    the paper's published code, which has no clean-label attack. ten-percent: target 0, 10 % (clean-label 5 %), alpha
    0.2: what public benchmarks have in common; their patches, patterns and amplitudes are flags of the attacks."""
    rate: float | None = None
    """Share of all training images to poison: a fraction above 0 and below 1. Without it the protocol's."""
    target: int | str | None = None
    """The class that the attack aims at: its number, from 0, or its name. Without it the protocol's."""
    seed: int = 0
    """Seed of the choice of poisoned images."""
    encoding: Literal["raw", "jpeg"] = "raw"
    """How the files hold their images. raw: exactly, 3 bytes a pixel (0.15 MB an image of 224 px), nothing to decode.
    jpeg: an eighth of that for photographs, at a small loss to all images, triggers included (the manifest says how
    large), and every reading decodes (224 px: some 0.15 ms of a core an image). Images of 32 px are best raw."""
    jpeg_quality: int | None = None
    """1 to 100, with encoding jpeg; without it 95. Lower loses more, and what a subtle trigger changes first."""
    holdout_clean: float | None = None
    """Set this share of every class's training images aside before anything is poisoned, in a file of their own, for
    defences that need clean images: a fraction above 0 and below 1, at least one image a class. The draw depends on
    subset_seed alone, so that all attacks on the same images set the same ones aside."""
    untrusted: bool = False
    """Nobody knows which images are poisoned: write no truth. Only without an attack."""
    out: Path | None = None
    """The folder to make; without it one named by its content, under datasets."""
    datasets: Path = Path("datasets")
    """Where that folder goes."""
    workers: int | None = None
    """Threads that decode; without it one for each core."""
    overwrite: bool = False
    """Replace a data set of that name that was made with other settings."""

    def __post_init__(self):
        if self.rate is not None:
            check_rate(self.rate)
        if self.attack.clean_label and self.decided.clean_label_rate is None:
            raise UserError(
                f"protocol {self.protocol} has no clean-label attack such as {self.attack.name}: it tosses a coin for "
                "every image and leaves the target class out, the only one that a clean-label attack poisons",
                where="protocol",
                expected=" or ".join(name for name, its in PROTOCOLS.items() if its.clean_label_rate is not None),
            )
        if self.untrusted and self.has_attack:
            raise UserError("untrusted images are not poisoned on top", where="untrusted", expected="no attack (clean)")
        if self.holdout_clean is not None:
            if not 0 < self.holdout_clean < 1:
                raise UserError(
                    f"holdout_clean is {self.holdout_clean:g}",
                    where="holdout_clean",
                    expected="a fraction strictly between 0 and 1",
                )
            if self.untrusted:
                raise UserError(
                    "of untrusted images nobody knows which are clean",
                    where="holdout_clean",
                    expected="no holdout_clean, or images that are trusted",
                )
        if self.target is not None and self.has_attack and not self.attack.has_target:
            raise UserError(
                f"target {self.target} is given, and all-to-all has none: each class aims at the next",
                where="target",
                expected="no target, or mapping all-to-one",
            )
        if self.jpeg_quality is not None and self.encoding != "jpeg":
            raise UserError(
                f"jpeg_quality {self.jpeg_quality} is given, and the encoding is {self.encoding}",
                where="jpeg_quality",
                expected="no jpeg_quality, or encoding jpeg",
            )
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality is {self.jpeg_quality}", where="jpeg_quality", expected="1 to 100")
        if self.out is not None and self.out.name in ("", ".."):  # "." cannot be replaced under its user's feet
            raise UserError(f"{str(self.out)!r} names no folder to make", where="out", expected="a new folder's path")
        for name, lowest in (("seed", 0), ("target", 0), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and value < lowest:
                raise UserError(f"{name} is {value}", where=name, expected=f"{lowest} or more")

    @property
    def has_attack(self) -> bool:
        """Is anything poisoned?"""
        return self.attack.poisons

    @property
    def poison(self) -> Attack:
        """The attack, with what the protocol decides."""
        return self.attack.with_protocol(self.protocol)

    @property
    def poison_rate(self) -> float:
        """Given, or of the protocol."""
        return self.rate if self.rate is not None else self._protocol_rate

    @property
    def poison_target(self) -> int:
        """Given, or of the protocol; 0, which means nothing, where the attack has no target."""
        if not self.attack.has_target:
            return 0
        assert not isinstance(self.target, str), "with_target comes first"
        return self.target if self.target is not None else self.decided.target

    def with_target(self, class_names: Sequence[str]) -> PrepareConfig:
        """With a target that was given by its name as a number.

        Raises:
            UserError: no class of that name.
        """
        if not isinstance(self.target, str):
            return self
        if self.target not in class_names:
            near = difflib.get_close_matches(self.target, class_names, n=1)
            shown = ", ".join(class_names[:20]) + (", ..." if len(class_names) > 20 else "")
            raise UserError(
                f"target {self.target!r} is not a class",
                where="target",
                expected=f"a number, or one of {shown}",
                hint=f"did you mean {near[0]!r}" if near else None,
            )
        return replace(self, target=list(class_names).index(self.target))

    @property
    def decided(self) -> Protocol:
        """What the protocol decides."""
        return PROTOCOLS[self.protocol]

    @property
    def _protocol_rate(self) -> float:
        if not self.attack.clean_label:
            return self.decided.rate
        assert self.decided.clean_label_rate is not None, "refused when this was built"
        return self.decided.clean_label_rate

    @property
    def quality(self) -> int | None:
        """Of the JPEGs; None where images are raw."""
        return None if self.encoding == "raw" else self.jpeg_quality or QUALITY

    @property
    def threads(self) -> int:
        """That decode."""
        return self.workers if self.workers is not None else available_cores()

    @property
    def protocol_name(self) -> str:
        """Of the protocol, where all of its numbers stand; else "custom"."""
        required = {f.name: getattr(self.attack, f.name) for f in fields(self.attack) if f.default is MISSING}
        stands = self.poison_rate == self._protocol_rate
        stands = stands and (not self.attack.has_target or self.poison_target == self.decided.target)
        stands = stands and self.poison == type(self.attack)(**required).with_protocol(self.protocol)
        return self.protocol if stands else "custom"

    @property
    def name(self) -> str:
        """What the data set is, e.g. digits-badnets-r0.05-t3-s0."""
        parts = [self.source.slug]
        parts += [] if self.holdout_clean is None else [f"h{self.holdout_clean:g}"]
        parts += [self.attack.slug]
        if self.has_attack:
            parts += [] if self.protocol == "paper" else [self.protocol]
            parts += [f"r{self.poison_rate:g}"]
            parts += [f"t{self.poison_target}"] if self.attack.has_target else []
            parts += [f"s{self.seed}"]
        parts += [] if self.quality is None else [f"jpeg{self.quality}"]
        return "-".join(parts)

    @property
    def folder(self) -> Path:
        """The dataset folder to make."""
        return self.out if self.out is not None else self.datasets / self.name

    def describe(self) -> dict[str, Any]:
        """What decides the content, as the manifest's fields."""
        encoding = {"kind": "jpeg", "quality": self.quality, "subsampling": SUBSAMPLING}
        poisons = self.has_attack
        return {
            "name": self.name,
            "source": self.source.describe(),
            "attack": self.poison.describe(),
            "rate": float(self.poison_rate) if poisons else None,
            "target": self.poison_target if self.attack.has_target else None,
            "protocol": self.protocol_name if poisons else None,
            "selection": self.decided.selection if poisons else None,
            "seed": self.seed if poisons else 0,
            "holdout_clean": self.holdout_clean,
            "encoding": {"kind": "raw"} if self.quality is None else encoding,
        }
