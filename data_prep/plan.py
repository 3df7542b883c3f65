"""Who is poisoned, who is a cover, with which labels and triggers: pure, seeded, drawn before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from data_prep.attacks.attack import Attack, Trigger
from data_prep.attacks.protocols import Selection
from data_prep.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PoisonPlan:
    """What happens to every image of a data set."""

    attack: Attack
    poisoned: np.ndarray
    """bool (n,): training images that carry the trigger, for the attacker's label."""
    cover: np.ndarray
    """bool (n,): training images that carry a trigger and keep their label; none is poisoned."""
    labels: np.ndarray
    """int64 (n,): as training is given them."""
    label_map: tuple[int, ...]
    """The label that triggered images of each class are to be given; empty without an attack."""

    def train_trigger(self, image_px: int) -> Trigger:
        """What is done to training images of image_px x image_px: the attack's triggers where it is their turn."""
        if not self.attack.poisons:
            return lambda images, index: images
        roles = (
            (self.poisoned, self.attack.train_trigger(image_px)),
            (self.cover, self.attack.cover_trigger(image_px)),
        )

        def trigger(images: np.ndarray, index: np.ndarray) -> np.ndarray:
            out = images.copy()
            for role, apply in roles:
                hit = role[index]
                if hit.any():
                    out[hit] = apply(images[hit], index[hit])
            return out

        return trigger

    def test_trigger(self, image_px: int) -> Trigger | None:
        """What is done to the test images of the triggered split; None where there is no such split."""
        return self.attack.test_trigger(image_px) if self.attack.poisons else None


def draw_plan(
    labels: np.ndarray,
    attack: Attack,
    *,
    rate: float,
    target: int,
    num_classes: int,
    seed: int,
    selection: Selection = "exact",
) -> PoisonPlan:
    """Draw who is poisoned and who is a cover; see `choose_poisoned` and `choose_covers`.

    Args:
        labels: int (n,), the true labels of the training images.
        attack: with what its protocol decides.
        rate, target, num_classes, seed, selection: as for `choose_poisoned`; without an attack they mean nothing.
    """
    poisoned, cover, given = np.zeros(len(labels), dtype=bool), np.zeros(len(labels), dtype=bool), labels.copy()
    if not attack.poisons:
        return PoisonPlan(attack=attack, poisoned=poisoned, cover=cover, labels=given, label_map=())
    poisoned = choose_poisoned(
        labels,
        rate=rate,
        target=target,
        num_classes=num_classes,
        seed=seed,
        eligible=attack.eligible(labels, target),
        selection=selection,
    )
    if attack.covers_per_poisoned:
        cover = choose_covers(poisoned, ratio=attack.covers_per_poisoned, seed=seed)
    label_map = attack.relabel(np.arange(num_classes), target, num_classes)
    given[poisoned] = label_map[labels[poisoned]]
    return PoisonPlan(attack=attack, poisoned=poisoned, cover=cover, labels=given, label_map=tuple(label_map.tolist()))


def check_rate(rate: object) -> float:
    """The poisoning rate as a float.

    Raises:
        UserError: not a number strictly between 0 and 1.
    """
    expected = "a fraction strictly between 0 and 1"
    if isinstance(rate, bool) or not isinstance(rate, Real):
        raise UserError(f"poisoning rate {rate!r} is not a number", where="rate", expected=expected)
    value = float(rate)
    if not 0 < value < 1:
        hint = f"for {value:g} % say {value / 100:g}" if 1 <= value < 100 else None
        if value == 0:
            hint = "for a data set without poison choose no attack"
        raise UserError(f"poisoning rate {value:g} is out of range", where="rate", expected=expected, hint=hint)
    return value


def check_target(target: int, class_names: Sequence[str]) -> int:
    """The target label.

    Raises:
        UserError: not a class.
    """
    if isinstance(target, bool) or not isinstance(target, int | np.integer) or not 0 <= target < len(class_names):
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(class_names[:20]))
        more = ", ..." if len(class_names) > 20 else ""
        raise UserError(
            f"target {target!r} is not a class",
            where="target",
            expected=f"0 to {len(class_names) - 1} ({shown}{more})",
        )
    return int(target)


def choose_poisoned(
    labels: np.ndarray,
    *,
    rate: float,
    target: int,
    num_classes: int,
    seed: int,
    eligible: np.ndarray | None = None,
    selection: Selection = "exact",
) -> np.ndarray:
    """Draw the samples to poison, uniformly and without replacement from the eligible ones.

    The count is `rate` of *all* samples, rounded to the nearest integer, halves up, as in Huang et al., ICLR
    2022 (arXiv 2202.03423), where 5 % of CIFAR-10 are 2,500 images; it is met exactly. Their published code tosses
    a coin for every image instead and leaves the target class out afterwards: selection "coin".

    Args:
        labels: int (n,), the true labels.
        rate: share of all n samples, strictly between 0 and 1.
        target: the label that the attack aims at.
        num_classes: K; labels lie in 0 to K - 1.
        seed: of this draw alone.
        eligible: bool (n,); without it every sample that is not of the target class.
        selection: "exact" or "coin".

    Returns:
        bool (n,), True where poisoned.

    Raises:
        UserError: rate out of range, too low for a single image, or above what the eligible samples hold;
            target not a class.
    """
    rate = check_rate(rate)
    check_target(target, [str(i) for i in range(num_classes)])
    pool = np.flatnonzero(labels != target if eligible is None else eligible)
    if selection == "coin":
        poisoned = np.zeros(len(labels), dtype=bool)
        poisoned[pool] = np.random.default_rng(seed).random(len(labels))[pool] < rate
        if not poisoned.any():
            raise UserError(f"poisoning rate {rate:g} poisons no image", where="rate", hint="raise it")
        return poisoned
    count = int(np.floor(rate * len(labels) + 0.5))
    if count == 0:
        raise UserError(
            f"poisoning rate {rate:g} of {len(labels)} images is less than one image",
            where="rate",
            expected=f"at least {1 / max(1, len(labels)):.2g}",
        )
    if count > len(pool):
        raise UserError(
            f"poisoning rate {rate:g} asks for {count} of {len(labels)} images, only {len(pool)} can be poisoned",
            where="rate",
            expected=f"at most {np.floor(len(pool) / len(labels) * 1e4) / 1e4:g}",
        )
    poisoned = np.zeros(len(labels), dtype=bool)
    poisoned[np.random.default_rng(seed).choice(pool, size=count, replace=False)] = True
    return poisoned


def choose_covers(poisoned: np.ndarray, *, ratio: float, seed: int) -> np.ndarray:
    """Draw the samples that carry a trigger and keep their label, from those that are not poisoned, of any class.

    Args:
        poisoned: bool (n,).
        ratio: covers for each poisoned sample; the count is rounded to the nearest integer, halves up.
        seed: of the choice of poisoned samples; the draw is another one.

    Returns:
        bool (n,), True where a cover.

    Raises:
        UserError: more than there are.
    """
    count, pool = int(np.floor(ratio * poisoned.sum() + 0.5)), np.flatnonzero(~poisoned)
    if count > len(pool):
        raise UserError(
            f"{count} covers for {int(poisoned.sum())} poisoned images, only {len(pool)} others are left",
            where="rate",
            expected=f"a rate of at most {1 / (1 + ratio):.3g} with {ratio:g} covers for each",
        )
    covers = np.zeros(len(poisoned), dtype=bool)
    covers[np.random.default_rng([seed, 1]).choice(pool, size=count, replace=False)] = True
    return covers
