from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data_prep.attacks import AdapBlend, AdapPatch, adap_blend, adap_patch, blended
from data_prep.errors import UserError


def mixed(x: int, p: int, alpha: float) -> int:
    share = Fraction(repr(alpha))
    return int((1 - share) * int(x) + share * int(p) + Fraction(1, 2))


def test_adap_blend_blends_the_shown_pieces_only(rng):
    images = rng.integers(0, 256, (2, 10, 10, 3), dtype=np.uint8)
    pattern = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
    shown = rng.random((2, 4, 4)) < 0.5
    made = adap_blend(images, pattern, 0.15, shown)
    for i in range(2):
        for y in range(10):
            for x in range(10):
                for c in range(3):
                    wanted = images[i, y, x, c]
                    if shown[i, y * 4 // 10, x * 4 // 10]:
                        wanted = mixed(wanted, pattern[y, x, c], 0.15)
                    assert made[i, y, x, c] == wanted


def test_adap_patch_stamps_each_patch_in_its_place(rng):
    images = rng.integers(0, 256, (2, 9, 9, 3), dtype=np.uint8)
    patches = [(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8), row, col, alpha)
               for row, col, alpha in ((0, 0, 0.5), (6, 4, 0.2))]  # fmt: skip
    made = adap_patch(images, patches)
    for i in range(2):
        for y in range(9):
            for x in range(9):
                for c in range(3):
                    wanted = images[i, y, x, c]
                    for patch, row, col, alpha in patches:
                        if row <= y < row + 3 and col <= x < col + 3:
                            wanted = mixed(wanted, patch[y - row, x - col, c], alpha)
                    assert made[i, y, x, c] == wanted


@pytest.mark.parametrize("attack", [AdapBlend(), AdapPatch()])
def test_draws_are_each_samples_own(attack, rng):
    images = np.repeat(rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8), 40, axis=0)
    trigger = attack.train_trigger(16)
    together = trigger(images, np.arange(40))
    for i in range(40):
        assert (trigger(images[:1], np.array([i]))[0] == together[i]).all()
    different = len(np.unique(together.reshape(40, -1), axis=0))
    assert different == 4 if isinstance(attack, AdapPatch) else different > 30


@pytest.mark.parametrize(
    ("fields", "pieces", "count"),
    [({}, 4, 8), ({"shown": 0.25}, 4, 4), ({"pieces": 3}, 3, 5), ({"shown": 0.01}, 4, 1), ({"shown": 1.0}, 4, 16)],
)
def test_so_many_pieces_are_shown_in_every_image(fields, pieces, count):
    px = 4 * pieces
    attack = AdapBlend(alpha=1.0, **fields)
    made = attack.train_trigger(px)(np.zeros((100, px, px, 3), dtype=np.uint8), np.arange(100))
    touched = (made.reshape(100, pieces, 4, pieces, 4, 3) != 0).any(axis=(2, 4, 5))
    assert (touched.sum(axis=(1, 2)) == count).all()
    if count == 8:  # each piece as often as any other: 50 of 100 times, give or take four standard deviations
        assert np.abs(touched.sum(axis=0) - 50).max() <= 20


def test_test_images_carry_the_whole_trigger(rng):
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    blend, patch = AdapBlend(test_alpha=0.3), AdapPatch(test_patches=(1, 3))
    pattern = np.random.default_rng(0).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    assert (blend.test_trigger(16)(images, np.arange(2)) == blended(images, pattern, 0.3)).all()
    made = patch.test_trigger(16)(images, np.arange(2))
    for which, (pixels, row, col) in enumerate(patch.patches(16)):
        area = made[:, row : row + len(pixels), col : col + len(pixels)]
        assert (area == pixels).all() == (which in (1, 3))


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: AdapBlend(alpha=0.0), "alpha"),
        (lambda: AdapBlend(test_alpha=1.1), "test_alpha"),
        (lambda: AdapBlend(pieces=0), "pieces"),
        (lambda: AdapBlend(shown=0.0), "shown"),
        (lambda: AdapBlend(cover_ratio=-0.1), "cover_ratio"),
        (lambda: AdapBlend(pieces=20).train_trigger(16), "pieces"),
        (lambda: AdapPatch(opacities=(0.5, 0.5, 0.5, 2.0)), "opacities"),
        (lambda: AdapPatch(test_patches=()), "test_patches"),
        (lambda: AdapPatch(test_patches=(4,)), "test_patches"),
        (lambda: AdapPatch(patch_px=9).train_trigger(16), "patch_px"),
    ],
)
def test_fields_out_of_range(make, where):
    with pytest.raises(UserError) as error:
        make()
    assert error.value.where == where
    assert error.value.expected
