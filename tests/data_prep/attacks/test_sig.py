from __future__ import annotations

import math

import numpy as np
import pytest

from data_prep.attacks import Sig, sig
from data_prep.errors import UserError


@pytest.mark.parametrize(("px", "delta", "frequency"), [(16, 20.0, 6.0), (32, 33.3, 6.0), (24, 127.0, 2.5)])
def test_sig_is_the_formula(px, delta, frequency, rng):
    images = rng.integers(0, 256, (2, px, px, 3), dtype=np.uint8)
    made = sig(images, delta, frequency)
    for i in range(2):
        for y in range(px):
            for x in range(px):
                for channel in range(3):
                    exact = images[i, y, x, channel] + delta * math.sin(2 * math.pi * x * frequency / px)
                    assert abs(made[i, y, x, channel] - min(max(exact, 0), 255)) <= 0.5 + 1e-9


def test_test_images_may_get_a_stronger_wave(rng):
    images = rng.integers(64, 192, (1, 16, 16, 3), dtype=np.uint8)
    attack = Sig(test_delta=40.0)
    index = np.array([0])
    assert (attack.train_trigger(16)(images, index) == sig(images, 20.0, 6.0)).all()
    assert (attack.test_trigger(16)(images, index) == sig(images, 40.0, 6.0)).all()


def test_sig_poisons_the_target_class_and_keeps_labels():
    labels = np.array([0, 3, 1, 3])
    assert Sig().eligible(labels, 3).tolist() == [False, True, False, True]
    assert Sig().relabel(labels[[1, 3]], 3, 4).tolist() == [3, 3]


@pytest.mark.parametrize("fields", [{"delta": 0.0}, {"delta": 128.0}, {"test_delta": -3.0}, {"frequency": 0.0}])
def test_fields_out_of_range(fields):
    with pytest.raises(UserError) as error:
        Sig(**fields)
    assert error.value.where == next(iter(fields))


def test_too_many_periods():
    with pytest.raises(UserError, match=r"9 periods do not fit 16 columns.*at most 8"):
        Sig(frequency=9.0).train_trigger(16)
