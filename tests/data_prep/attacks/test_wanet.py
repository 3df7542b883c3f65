"""WaNet against the formula of its paper: once through torch's own interpolation, once in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.attacks import WaNet, wanet
from data_prep.attacks.wanet import warp_field, warp_positions
from data_prep.errors import UserError


def formula(images: np.ndarray, field: np.ndarray, strength: float, noise: np.ndarray | None = None) -> np.ndarray:
    """Identity grid plus field, clipped, sampled: loops in float64. float64 (B, H, H, 3). The noise is that of the
    paper, 1 / H, at its strength of 0.5."""
    px = images.shape[1]
    out = np.zeros(images.shape)
    for y in range(px):
        for x in range(px):
            at = []
            for axis, pixel in enumerate((x, y)):
                place = -1 + 2 * pixel / (px - 1) + strength / px * field[axis, y, x]
                place = min(max(place, -1.0), 1.0)
                if noise is not None:
                    place = min(max(place + strength / 0.5 * noise[axis, y, x] / px, -1.0), 1.0)
                at.append((place + 1) / 2 * (px - 1))
            column, row = at
            for dy in (0, 1):
                for dx in (0, 1):
                    r, c = math.floor(row) + dy, math.floor(column) + dx
                    weight = (1 - abs(row - r)) * (1 - abs(column - c))
                    if weight > 0:
                        out[:, y, x] += weight * images[:, r, c]
    return out


@pytest.mark.parametrize(("px", "grid", "seed"), [(16, 4, 0), (32, 4, 7), (33, 2, 1), (20, 8, 3)])
def test_field_is_torchs_bicubic_interpolation(px, grid, seed):
    vectors = np.random.default_rng(seed).uniform(-1, 1, size=(2, grid, grid))
    vectors /= np.abs(vectors).mean()
    wanted = F.interpolate(torch.from_numpy(vectors)[None], size=px, mode="bicubic", align_corners=True)[0]
    assert np.allclose(warp_field(grid, px, seed), wanted.numpy(), atol=1e-12)


@pytest.mark.parametrize("strength", [0.5, 2.0, 6.0])
def test_warp_is_the_formula_within_one_grey_level(strength, rng):
    images = rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    field = warp_field(4, 16, seed=2)
    noise = rng.uniform(-1, 1, field.shape)
    for extra in (None, noise):
        made = wanet(images, warp_positions(field, strength, extra))
        assert np.abs(made - formula(images, field, strength, extra)).max() <= 1


def test_warp_is_torchs_grid_sample_within_one_grey_level(rng):
    px = 224
    images = rng.integers(0, 256, (1, px, px, 3), dtype=np.uint8)
    field = warp_field(4, px, seed=0)
    line = torch.linspace(-1, 1, px, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = torch.stack([x, y], dim=-1) + torch.from_numpy(field).permute(1, 2, 0) * (3.5 / px)
    source = torch.from_numpy(images).double().permute(0, 3, 1, 2)
    wanted = F.grid_sample(source, grid.clamp(-1, 1)[None], mode="bilinear", align_corners=True)
    made = WaNet(noise_ratio=0).train_trigger(px)(images, np.array([0]))
    assert np.abs(made - wanted.permute(0, 2, 3, 1).numpy()).max() <= 1


def test_field_is_one_for_all_images_and_comes_from_its_seed(rng):
    images = rng.integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    attack = WaNet(field_seed=3)
    together = attack.train_trigger(16)(images, np.arange(5))
    for i in range(5):  # whichever batch and index
        assert (attack.train_trigger(16)(images[i : i + 1], np.array([100 + i])) == together[i]).all()
    assert (WaNet(field_seed=4).train_trigger(16)(images, np.arange(5)) != together).any()
    assert (attack.test_trigger(16)(images, np.arange(5)) == together).all()


def test_noise_is_each_covers_own(rng):
    images = np.repeat(rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), 3, axis=0)
    attack = WaNet(field_seed=3)
    made = attack.cover_trigger(16)(images, np.array([4, 9, 4]))
    assert (made[0] == made[2]).all()
    assert (made[0] != made[1]).any()
    assert (made[0] != attack.train_trigger(16)(images[:1], np.array([4]))[0]).any()
    noise = np.random.default_rng([3, 4]).uniform(-1, 1, size=(2, 16, 16))
    assert np.abs(made[:1] - formula(images[:1], warp_field(4, 16, 3), 0.5, noise)).max() <= 1


@pytest.mark.parametrize("strength", [None, 0.5])
def test_noise_samples_differ_from_the_trigger_as_much_at_every_size(strength):
    """On an image whose grey level is its column, differences are displacements: uniform noise of amplitude a has an
    rms of a / sqrt(3), in pixels of half the grid's length."""
    ratios = []
    for px in (32, 64, 224):
        slope = np.broadcast_to(np.arange(px, dtype=np.uint8)[None, :, None], (px, px, 3))
        attack = WaNet(strength=strength)
        index = np.array([7])
        trigger, cover = (f(px)(slope[None], index)[0] * 1.0 for f in (attack.train_trigger, attack.cover_trigger))
        field, used = attack.field(px)
        assert used == (strength or px / 64)
        inner = (slice(px // 8, -px // 8), slice(px // 8, -px // 8))  # where nothing is clipped
        exact = warp_positions(field, used) - np.mgrid[:px, :px][::-1]
        noise = warp_positions(field, used, np.random.default_rng([0, 7]).uniform(-1, 1, field.shape))
        moved = (noise - warp_positions(field, used))[0][inner]
        assert np.sqrt((moved**2).mean()) == pytest.approx(2 * used / px / math.sqrt(3) * (px - 1) / 2, rel=0.05)
        ratios.append(np.sqrt((moved**2).mean() / (exact[0][inner] ** 2).mean()))
        assert np.abs(cover - trigger)[inner].max() <= math.ceil(2 * used / px * (px - 1) / 2) + 1
    assert max(ratios) / min(ratios) < 1.1


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"grid": 1}, "grid"), ({"strength": 0.0}, "strength"), ({"noise_ratio": -1.0}, "noise_ratio"),
     ({"field_seed": -1}, "field_seed"), ({"strength": math.inf}, "strength")],
)  # fmt: skip
def test_fields_out_of_range(fields, where):
    with pytest.raises(UserError) as error:
        WaNet(**fields)
    assert error.value.where == where
    assert error.value.expected


def test_a_warp_that_leaves_the_image():
    with pytest.raises(UserError, match="out of the image") as error:
        WaNet(strength=40.0).train_trigger(16)
    assert error.value.expected is not None
    largest = float(error.value.expected.split()[2])
    WaNet(strength=largest * 0.99).train_trigger(16)
