"""What `draw` draws, and which settings it refuses."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from data_prep.errors import UserError
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig, Params

COUNT = 20_000
SPREAD = 5 * (0.25 / COUNT) ** 0.5  # five standard deviations of the share of a fair coin: 0.018


def draw(config: AugmentConfig, count: int = COUNT, height: int = 32, width: int = 32, seed: int = 0) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return augment.draw(config, count, height=height, width=width, generator=generator)


def test_bits_come_with_their_probabilities():
    params = draw(AugmentConfig())
    for bit_B, p in (
        (params.flip_B, 0.5),
        (params.jitter_B, 0.8),
        (params.grayscale_B, 0.2),
        (params.blur_B, 0.5),
    ):
        assert abs(bit_B.double().mean().item() - p) < SPREAD
    both = (params.flip_B & params.blur_B).double().mean().item()
    assert abs(both - 0.25) < SPREAD  # independent of each other
    sure = draw(AugmentConfig(flip_p=1.0, jitter_p=0.0), 500)
    assert sure.flip_B.all()
    assert not sure.jitter_B.any()


@pytest.mark.parametrize(
    ("jitter", "ranges"),
    [
        ((0.4, 0.3, 0.2, 0.1), [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]),
        ((2.0, 0.0, 1.0, 0.5), [(0.0, 3.0), (1.0, 1.0), (0.0, 2.0), (-0.5, 0.5)]),
    ],
)
def test_factors_fill_their_ranges(jitter, ranges):
    factor_B4 = draw(AugmentConfig(jitter=jitter)).factor_B4.double()
    for values, (low, high) in zip(factor_B4.T, ranges):
        assert low - 1e-6 <= values.min() <= low + 0.01 * (high - low) + 1e-6
        assert high - 0.01 * (high - low) - 1e-6 <= values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) <= 0.01 * (high - low) + 1e-6


def test_all_orders_of_the_jitter_are_equally_likely():
    orders = [tuple(order) for order in draw(AugmentConfig()).order_B4.tolist()]
    for order in permutations(range(4)):
        assert abs(orders.count(order) / COUNT - 1 / 24) < SPREAD / 2


def test_blur_sigma_is_uniform():
    sigma_B = draw(AugmentConfig(blur_sigma=(0.5, 1.5))).sigma_B
    counts = torch.histc(sigma_B, 10, min=0.5, max=1.5)
    assert counts.sum() == COUNT
    assert ((counts / COUNT - 0.1).abs() < SPREAD).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (224, 224), (28, 20), (16, 40)])
def test_resized_boxes_fit_with_the_right_area_and_shape(height, width):
    config = AugmentConfig()
    top_B, left_B, h_B, w_B = draw(config, height=height, width=width).box_B4.unbind(1)
    assert (top_B >= 0).all()
    assert (left_B >= 0).all()
    assert (top_B + h_B <= height).all()
    assert (left_B + w_B <= width).all()
    rounding = 1 / min(height, width)
    ratio_B = w_B / h_B
    assert ratio_B.min() > config.ratio[0] * (1 - 3 * rounding)
    assert ratio_B.max() < config.ratio[1] * (1 + 3 * rounding)
    assert (h_B * w_B / (height * width)).min() > config.scale[0] * (1 - 3 * rounding)


def test_resized_boxes_are_distributed_as_those_of_torchvision():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, 48, 64)
    theirs_B4 = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)])
    ours_B4 = draw(AugmentConfig(), height=48, width=64).box_B4
    for ours, theirs in zip(ours_B4.double().T, theirs_B4.double().T):
        levels = torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98], dtype=torch.float64)
        assert (ours.quantile(levels) - theirs.quantile(levels)).abs().max() <= 1.5  # pixels
        assert abs(ours.mean() - theirs.mean()) < 0.6


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 40, [0, 13, 10, 13]), (40, 10, [13, 0, 13, 10]), (20, 20, [0, 0, 20, 20])],
)
def test_boxes_that_never_fit_fall_back_to_the_middle(height, width, box, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, 0.5, dtype=torch.float64))
    config = AugmentConfig(scale=(1.0, 1.0)) if height != width else AugmentConfig(scale=(1.0, 1.0), ratio=(0.5, 1.0))
    assert draw(config, 3, height, width).box_B4.tolist() == [box] * 3


def test_pad_crops_reach_every_shift_equally():
    box_B4 = draw(AugmentConfig(crop="pad", pad_px=2)).box_B4
    assert (box_B4[:, 2:] == 32).all()
    for axis in range(2):
        shift, counts = box_B4[:, axis].unique(return_counts=True)
        assert shift.tolist() == [-2, -1, 0, 1, 2]
        assert ((counts / COUNT - 0.2).abs() < SPREAD).all()


def test_same_generator_state_same_parameters_and_images_differ():
    first, again, other = (
        draw(AugmentConfig(), 64),
        draw(AugmentConfig(), 64),
        draw(AugmentConfig(), 64, seed=1),
    )
    for name in ("box_B4", "flip_B", "jitter_B", "factor_B4", "order_B4", "grayscale_B", "blur_B", "sigma_B"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.factor_B4, other.factor_B4)
    assert len(first.factor_B4.unique(dim=0)) == 64


def test_parts_of_parameters():
    params = draw(AugmentConfig(), 10)
    assert len(params) == 10
    assert len(params[2:5]) == 3
    assert torch.equal(params[2:5].box_B4, params.box_B4[2:5])
    assert torch.equal(params[torch.tensor([9, 0])].sigma_B, params.sigma_B[[9, 0]])
    assert params[2:5].height == 32


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": "centre"},
        {"interpolation": "nearest"},
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 1.5)},
        {"scale": (0.9, 0.5)},
        {"ratio": (1.0,)},
        {"ratio": (1.0, float("inf"))},
        {"pad_px": -1},
        {"flip_p": 1.5},
        {"jitter_p": -0.1},
        {"grayscale_p": float("nan")},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"jitter": (-0.4, 0.4, 0.4, 0.1)},
        {"blur_sigma": (0.0, 2.0)},
        {"mean": (0.5, 0.5)},
        {"std": (0.2, 0.0, 0.2)},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(UserError, match=name) as caught:
        AugmentConfig(**wrong)
    assert caught.value.expected


def test_images_too_small_are_refused():
    with pytest.raises(UserError, match="pad_px"):
        draw(augment.weak_pad(), 1, height=4, width=32)
    with pytest.raises(UserError, match="blurred"):
        draw(augment.simclr(), 1, height=1, width=32)


@pytest.mark.parametrize(("size", "kernel_px"), [(8, 3), (16, 3), (28, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_kernel_is_odd_and_a_tenth_of_the_image(size, kernel_px):
    assert augment.blur_kernel_px(AugmentConfig(), size, size + 5) == kernel_px
