from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from data_prep.attacks import AdapBlend, BadNets, Blended, NoAttack, badnets, blended, checkerboard
from data_prep.errors import UserError


def test_checkerboard_is_drawn_as_expected():
    w, b = 255, 0
    drawn = [[w, b, w], [b, w, b], [w, b, w]]
    for channel in range(3):
        assert checkerboard(3)[:, :, channel].tolist() == drawn
    scaled = checkerboard(21)[:, :, 0]
    for row in range(21):
        for col in range(21):
            assert scaled[row, col] == drawn[row // 7][col // 7]
    assert checkerboard(1).tolist() == [[[w, w, w]]]


def test_badnets_changes_the_patch_and_nothing_else(rng):
    images = rng.integers(0, 256, (4, 10, 12, 3), dtype=np.uint8)
    patch = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    before = images.copy()
    stamped = badnets(images, patch, row=5, col=8)
    for i in range(4):
        for row in range(10):
            for col in range(12):
                inside = 5 <= row < 8 and 8 <= col < 11
                expected = patch[row - 5, col - 8] if inside else before[i, row, col]
                assert (stamped[i, row, col] == expected).all()
    assert (images == before).all()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.123456, 1.0, 0.000001])
def test_blended_rounds_exactly_for_every_pair_of_grey_levels(alpha):
    x = np.repeat(np.arange(256, dtype=np.uint8), 256).reshape(1, 256, 256, 1)
    p = np.tile(np.arange(256, dtype=np.uint8), 256).reshape(256, 256, 1)
    mixed = blended(np.repeat(x, 3, axis=3), np.repeat(p, 3, axis=2), alpha)
    share = Fraction(repr(alpha))
    for grey in range(0, 256, 5):
        for pattern in range(256):
            exact = (1 - share) * grey + share * pattern
            assert mixed[0, grey, pattern].tolist() == [int(exact + Fraction(1, 2))] * 3


def test_blended_leaves_its_input_alone(rng):
    images = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    before = images.copy()
    blended(images, images[0], 0.3)
    assert (images == before).all()


@pytest.mark.parametrize(("px", "side", "margin"), [(16, 3, 1), (32, 3, 1), (64, 6, 2), (224, 21, 7)])
def test_default_patch_scales_with_the_image(px, side, margin):
    patch, row, col = BadNets().patch(px)
    assert patch.shape == (side, side, 3)
    assert (row, col) == (px - side - margin, px - side - margin)


def test_how_often_a_patch_stays_whole_under_the_weak_crop():
    """Every shift of up to 4 px: the default patch is whole in 36 of 81 and gone in 17, at (4, 4) always whole."""
    for attack, whole, gone in ((BadNets(), 36, 17), (BadNets(row=4, col=4, patch_px=2), 81, 0)):
        patch, row, col = attack.patch(32)
        visible = [
            sum(
                0 <= row + y - down < 32 and 0 <= col + x - right < 32
                for y in range(len(patch))
                for x in range(len(patch))
            )
            for down in range(-4, 5)
            for right in range(-4, 5)
        ]
        assert visible.count(len(patch) ** 2) == whole
        assert visible.count(0) == gone


@pytest.mark.parametrize(
    ("corner", "row", "col"),
    [("top-left", 2, 2), ("top-right", 2, 26), ("bottom-left", 26, 2), ("bottom-right", 26, 26)],
)
def test_corners(corner, row, col):
    assert BadNets(corner=corner, patch_px=4, margin_px=2).patch(32)[1:] == (row, col)


def test_place_by_row_and_column():
    patch, row, col = BadNets(row=4, col=5, patch_px=2, pattern="white").patch(32)
    assert (row, col) == (4, 5)
    assert (patch == 255).all()


def test_trigger_files_are_resized_where_that_is_asked_for(tmp_path):
    path = tmp_path / "logo.png"
    Image.new("RGB", (50, 40), (10, 200, 30)).save(path)
    patch, _, _ = BadNets(pattern=path, patch_px=5).patch(32)
    assert (patch == np.array([10, 200, 30])).all()
    assert patch.shape == (5, 5, 3)
    pattern = Blended(pattern=path, resize_pattern=True).pattern_image(16)
    assert pattern.shape == (16, 16, 3)
    assert (pattern == np.array([10, 200, 30])).all()


@pytest.mark.parametrize("attack", [Blended, AdapBlend])
def test_patterns_of_another_size_are_refused(attack, tmp_path):
    path = tmp_path / "logo.png"
    for size in ((50, 40), (16, 12), (32, 32)):
        Image.new("RGB", size).save(path)
        with pytest.raises(UserError, match=rf"has {size[0]} x {size[1]} px.*Expected: 16 x 16 px") as error:
            attack(pattern=path).train_trigger(16)
        assert "resize_pattern" in str(error.value.hint)


def test_patches_have_the_size_of_their_file(tmp_path, rng):
    path = tmp_path / "logo.png"
    pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    patch, row, col = BadNets(pattern=path).patch(16)
    assert (patch == pixels).all()
    assert (row, col) == (11, 11)
    Image.new("RGB", (17, 17)).save(path)
    with pytest.raises(UserError, match="17 px is larger than the image of 16 px"):
        BadNets(pattern=path).patch(16)
    Image.new("RGB", (4, 5)).save(path)
    with pytest.raises(UserError, match=r"4 x 5 px.*a square"):
        BadNets(pattern=path).patch(16)


def test_noise_is_fixed_by_its_seed():
    first, again, other = (Blended(pattern_seed=s).pattern_image(32) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).mean() > 0.9
    assert first.min() < 5
    assert first.max() > 250


def test_labels_of_an_all_to_one_attack():
    labels = np.array([0, 1, 2, 1])
    assert BadNets().eligible(labels, 1).tolist() == [True, False, True, False]
    assert BadNets().relabel(labels, 2, 3).tolist() == [2, 2, 2, 2]


def test_description_tells_an_edited_trigger_image_apart(tmp_path):
    path = tmp_path / "logo.png"
    Image.new("RGB", (4, 4), (0, 0, 0)).save(path)
    first = BadNets(pattern=path).describe()
    Image.new("RGB", (4, 4), (1, 0, 0)).save(path)
    assert first["pattern"] == "logo.png"
    assert first["pattern_sha256"] != BadNets(pattern=path).describe()["pattern_sha256"]
    assert NoAttack().describe() == {"kind": "clean"}


def test_an_attack_that_changed_is_another_in_the_manifest():
    """As data sets of before have it: no revision, and other images."""
    assert AdapBlend().describe()["revision"] == 2
    assert "revision" not in Blended().describe()


@pytest.mark.parametrize(
    "attack",
    [
        BadNets(patch_px=17),
        BadNets(patch_px=3, row=14, col=0),
        BadNets(row=-1, col=0),
        BadNets(patch_px=10, margin_px=7),
    ],
)
def test_trigger_larger_than_the_image(attack):
    with pytest.raises(UserError, match="16 px"):
        attack.train_trigger(16)


@pytest.mark.parametrize(
    ("kind", "options", "where"),
    [
        (BadNets, {"patch_px": 0}, "patch_px"),
        (BadNets, {"margin_px": -1}, "margin_px"),
        (BadNets, {"row": 1}, "row, col"),
        (Blended, {"alpha": 0.0}, "alpha"),
        (Blended, {"alpha": 1.5}, "alpha"),
        (Blended, {"alpha": float("nan")}, "alpha"),
        (Blended, {"alpha": 1 / 3}, "alpha"),
        (Blended, {"pattern_seed": -1}, "pattern_seed"),
    ],
)
def test_bad_options(kind, options, where):
    with pytest.raises(UserError) as error:
        kind(**options)
    assert error.value.where == where


@pytest.mark.parametrize("make", [lambda p: BadNets(pattern=p), lambda p: Blended(pattern=p)])
def test_unusable_trigger_images(make, tmp_path):
    missing, text, rgba, palette = (tmp_path / name for name in ("missing.png", "text.png", "rgba.png", "pal.png"))
    text.write_text("no image")
    Image.new("RGBA", (4, 4)).save(rgba)
    Image.new("P", (4, 4)).save(palette, transparency=0)
    for path, says in ((missing, "cannot read"), (text, "not an image"), (rgba, "alpha"), (palette, "alpha")):
        with pytest.raises(UserError, match=says) as error:
            make(path).train_trigger(16)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        make(missing).describe()
