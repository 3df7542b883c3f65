"""CTRL against its definition step by step: YUV, the cosine transform as a sum, two coefficients, and back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_prep.attacks import ATTACKS, Ctrl
from data_prep.errors import UserError

TO_YUV = np.array([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]])


def formula(image: np.ndarray, window: int, bands: tuple[int, ...], magnitude: float) -> np.ndarray:
    """One image (H, H, 3), H a multiple of the window, through the whole way in float64."""
    px = len(image)
    n = np.arange(window)
    cosine = np.array([[math.cos(math.pi * (2 * i + 1) * k / (2 * window)) for i in n] for k in n])
    cosine *= np.where(n == 0, math.sqrt(1 / window), math.sqrt(2 / window))[:, None]
    yuv = image.astype(np.float64) @ TO_YUV.T
    for top in range(0, px, window):
        for left in range(0, px, window):
            for channel in (1, 2):
                area = (slice(top, top + window), slice(left, left + window), channel)
                coefficients = cosine @ yuv[area] @ cosine.T
                for k in bands:
                    coefficients[k, k] += magnitude
                yuv[area] = cosine.T @ coefficients @ cosine
    return np.clip(yuv @ np.linalg.inv(TO_YUV).T, 0, 255)


@pytest.mark.parametrize(
    ("px", "window", "bands"), [(32, 32, (15, 31)), (64, 32, (15, 31)), (16, 16, (7, 15)), (16, 8, (0, 3))]
)
def test_ctrl_is_the_formula(px, window, bands, rng):
    images = rng.integers(0, 256, (2, px, px, 3), dtype=np.uint8)
    attack = Ctrl(window=window, bands=bands)
    for trigger, magnitude in ((attack.train_trigger(px), 50.0), (attack.test_trigger(px), 100.0)):
        made = trigger(images, np.arange(2))
        for image, found in zip(images, made):
            wanted = formula(image, window, bands, magnitude)
            # half a level of rounding; the published inverse of YUV has three decimals: 0.2 % of at most 51 levels
            assert np.abs(found - wanted).max() <= 0.5 + 0.12
            assert np.abs(found.astype(int) - image).max() > 5


def test_sizes_that_are_no_multiple_of_the_window_go_on_in_a_part_of_it(rng):
    images = rng.integers(60, 190, (1, 40, 40, 3), dtype=np.uint8)
    added = Ctrl().train_trigger(40)(images, np.array([0])).astype(int)[0] - images[0]
    assert (added[32:, 32:] == added[:8, :8]).all()
    assert (added[:32, 32:] == added[:32, :8]).all()


def test_ctrl_poisons_the_target_class_and_keeps_labels():
    labels = np.array([0, 3, 1, 3])
    assert ATTACKS["ctrl"] is Ctrl
    assert Ctrl().eligible(labels, 3).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"magnitude": 0.0}, "magnitude"), ({"test_magnitude": math.inf}, "test_magnitude"), ({"window": 1}, "window"),
     ({"bands": ()}, "bands"), ({"bands": (15, 32)}, "bands"), ({"bands": (3, 3)}, "bands"),
     ({"window": 16}, "bands")],
)  # fmt: skip
def test_fields_out_of_range(fields, where):
    with pytest.raises(UserError) as error:
        Ctrl(**fields)
    assert error.value.where == where
    assert error.value.expected


def test_a_window_that_does_not_fit():
    with pytest.raises(UserError, match=r"32 px does not fit images of 16 px.*at most 16"):
        Ctrl().train_trigger(16)
