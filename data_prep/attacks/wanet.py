"""WaNet (Nguyen & Tran 2021): the image is bent a little, the same way every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_prep.attacks.attack import PoisonLabel, Trigger, check_seed, sample_rng
from data_prep.errors import UserError

_NOISE = 2.0  # amplitude of the noise samples' noise in units of the strength: 1 / H beside s / H with s = 0.5
_CUBIC_A = -0.75  # the cubic kernel of torch's bicubic interpolation, which WaNet's field is defined with


def warp_field(grid: int, image_px: int, seed: int) -> np.ndarray:
    """The smooth random field of WaNet (Nguyen & Tran 2021, arXiv 2102.10369, sec. 3.2): grid x grid vectors uniform
    in [-1, 1], divided by their mean absolute value, interpolated bicubically from corner to corner.

    Returns:
        float64 (2, image_px, image_px): how far to look to the right, and down, in units that `warp_positions` scales.
    """
    vectors = np.random.default_rng(seed).uniform(-1, 1, size=(2, grid, grid))
    vectors /= np.abs(vectors).mean()
    weight = _bicubic(grid, image_px)
    return weight @ vectors @ weight.T


def warp_positions(field: np.ndarray, strength: float, noise: np.ndarray | None = None) -> np.ndarray:
    """Where each pixel of the warped image is taken from.

    The identity grid over [-1, 1] plus strength / H times the field (plus 2 strength / H times the noise), clipped to
    [-1, 1]. The paper adds noise of amplitude 1 / H to a field of strength 0.5: the ratio stays at every strength.

    Args:
        field: float64 (2, H, H), as from `warp_field`.
        strength: s of the paper; an absolute mean displacement of about s / 2 pixels.
        noise: float64 (2, H, H) in [-1, 1], of one cover image.

    Returns:
        float64 (2, H, H): column and row, in pixels from 0 to H - 1.
    """
    px = field.shape[1]
    line = np.linspace(-1, 1, px)
    where = np.stack(np.broadcast_arrays(line[None, :], line[:, None])) + field * (strength / px)
    if noise is not None:
        where = np.clip(where, -1, 1) + noise * (_NOISE * strength) / px
    return (np.clip(where, -1, 1) + 1) / 2 * (px - 1)


def wanet(images: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Warp images by bilinear sampling (Nguyen & Tran 2021).

    In integers, with weights of 11 bits, rounded to the nearest grey level: within one level of exact arithmetic and
    the same bytes on every machine.

    Args:
        images: uint8 (B, H, H, 3).
        positions: float64 (2, H, H), as from `warp_positions`: the same for all of them.

    Returns:
        uint8 (B, H, H, 3), a new array.
    """
    from data_prep.attacks.warping import ONE, sample  # loads a compiler

    px = images.shape[1]
    first = np.minimum(np.floor(positions), px - 2).astype(np.int64)
    weight = np.round((positions - first) * ONE).astype(np.int64)
    out = np.empty_like(images)
    sample(np.ascontiguousarray(images), first[1], first[0], weight[1], weight[0], out)
    return out


def _bicubic(source: int, size: int) -> np.ndarray:
    """Weights (size, source) that interpolate `source` points to `size`, the outer ones on the outer ones; points
    beyond the edge are the edge's."""
    weight = np.zeros((size, source))
    for i in range(size):
        at = i * (source - 1) / (size - 1)
        base = int(np.floor(at))
        for tap in range(base - 1, base + 3):
            d = abs(at - tap)
            if d <= 1:
                w = ((_CUBIC_A + 2) * d - (_CUBIC_A + 3)) * d * d + 1
            elif d < 2:
                w = ((d - 5) * d + 8) * d * _CUBIC_A - 4 * _CUBIC_A
            else:
                w = 0.0
            weight[i, min(max(tap, 0), source - 1)] += w
    return weight


@dataclass(frozen=True, kw_only=True)
class WaNet(PoisonLabel):
    """A smooth warp of the whole image (Nguyen & Tran 2021), as data poisoning: the field is drawn once a data set.

    With noise samples (their training mode) cover images carry the warp plus noise of their own and keep their
    label, so that a model must learn this very warp."""

    name: ClassVar[str] = "wanet"
    revision: ClassVar[int] = 2  # 1: noise of amplitude 1 / H whatever the strength

    grid: int = 4
    """Vectors of the field in each direction, k."""
    strength: float | None = None
    """Size of the warp, s; without it 0.5 for images up to 32 px and in proportion to the side above (1 for 64, 3.5 for
    224; the authors' code takes 0.5 at every size). The noise samples' noise grows with it."""
    noise_ratio: float = 2.0
    """Noise samples for each poisoned one; 0: none. The paper has 2."""
    field_seed: int = 0
    """Seed of the field and of the noise."""

    def __post_init__(self):
        if self.grid < 2:
            raise UserError(f"the grid has {self.grid} vectors a side", where="grid", expected="2 or more")
        if self.strength is not None and not 0 < self.strength < float("inf"):
            raise UserError(f"strength {self.strength} is out of range", where="strength", expected="above 0")
        if not 0 <= self.noise_ratio < float("inf"):
            raise UserError(f"ratio {self.noise_ratio} is out of range", where="noise_ratio", expected="0 or more")
        check_seed(self.field_seed, "field_seed")

    @property
    def covers_per_poisoned(self) -> float:
        return self.noise_ratio

    def field(self, image_px: int) -> tuple[np.ndarray, float]:
        """The field, float64 (2, image_px, image_px), and the strength that it is scaled with.

        Raises:
            UserError: the grid is finer than the image; the warp moves pixels by more than a quarter of the image.
        """
        if self.grid > image_px:
            expected = f"2 to {image_px}" if image_px >= 2 else "images of 2 px or more"
            raise UserError(f"a grid of {self.grid} does not fit {image_px} px", where="grid", expected=expected)
        strength = self.strength if self.strength is not None else 0.5 * max(1.0, image_px / 32)
        field = warp_field(self.grid, image_px, self.field_seed)
        unit = float(np.abs(field).max()) / image_px * (image_px - 1) / 2
        reach = unit * strength
        if reach > image_px / 4:
            raise UserError(
                f"a warp of strength {strength:g} moves pixels by up to {reach:.3g} px and out of the image",
                where="strength",
                expected=f"at most {image_px / 4 / unit:.3g} for images of {image_px} px",
            )
        return field, strength

    def train_trigger(self, image_px: int) -> Trigger:
        positions = warp_positions(*self.field(image_px))
        return lambda images, index: wanet(images, positions)

    def cover_trigger(self, image_px: int) -> Trigger:
        field, strength = self.field(image_px)

        def trigger(images: np.ndarray, index: np.ndarray) -> np.ndarray:
            out = np.empty_like(images)
            for i, sample in enumerate(index):
                noise = sample_rng(self.field_seed, int(sample)).uniform(-1, 1, size=field.shape)
                out[i : i + 1] = wanet(images[i : i + 1], warp_positions(field, strength, noise))
            return out

        return trigger
