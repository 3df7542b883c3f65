"""Patterns that mark a label, against an oracle and images whose triggers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dbd_dist.data.linear_patterns import FAR, RIDGE, pattern_scores, shrink, stand_out
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.stages import mixmatch, split
from tests.dbd_dist import tiny


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(count: int, px: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth noise, (N, 3, px, px) in 0-1, and labels that a linear function of it says little about."""
    draws = generator(1)
    coarse = torch.rand(count, 3, px // 2, px // 2, generator=draws)
    images = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    labels = torch.arange(count) % 4
    return (images + 0.02 * labels[:, None, None, None]).clamp(0, 1), labels


def trigger(kind: str, images: torch.Tensor) -> torch.Tensor:
    if kind == "patch":
        images = images.clone()
        images[:, :, -3:, -3:] = (torch.rand(3, 3, generator=generator(2)) > 0.5).float()
        return images
    pattern = torch.rand(images.shape[1:], generator=generator(3))
    if kind == "wave":
        pattern = torch.sin(torch.arange(images.shape[3]) * 3.0).expand_as(images[0]) / 2 + 0.5
    return 0.8 * images + 0.2 * pattern


def test_scores_against_a_discriminant_by_hand():
    images, labels = make_images(80, px=4)
    pixels = shrink(images)
    found = pattern_scores(pixels, labels, generator(5))
    half = torch.randperm(80, generator=generator(5)) % 2
    x, y = pixels.double().numpy(), labels.numpy()
    for i in range(80):
        fitted, held = (half != half[i]).numpy(), (half == half[i]).numpy()
        own, apart = fitted & (y == y[i]), fitted & (y != y[i])
        covariance = np.cov(x[apart].T, bias=True)
        covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        weights = np.linalg.solve(covariance, x[own].mean(0) - x[apart].mean(0))
        others = x[held & (y != y[i])] @ weights
        expected = (x[i] @ weights - others.mean()) / others.std(ddof=1)
        assert float(found[i]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("kind", ["patch", "blended", "wave"])
@pytest.mark.parametrize("clean_label", [False, True])
def test_images_with_the_same_trigger_stand_out(kind, clean_label):
    images, labels = make_images(2000)
    if clean_label:
        poisoned = ((labels == 2) & (torch.rand(2000, generator=generator(4)) < 0.2)).nonzero().flatten()
    else:
        poisoned = torch.randperm(2000, generator=generator(4))[:100]
    images[poisoned] = trigger(kind, images[poisoned])
    labels = labels.clone()
    labels[poisoned] = 2
    found = stand_out(pattern_scores(shrink(images), labels, generator()), labels, 4)
    assert int(found[poisoned].sum()) >= 0.95 * len(poisoned)
    assert int(found.sum()) - int(found[poisoned].sum()) <= 5


def test_nothing_stands_out_of_clean_images():
    images, labels = make_images(2000)
    assert not stand_out(pattern_scores(shrink(images), labels, generator()), labels, 4).any()


def test_labels_that_a_linear_function_tells_apart_do_not_stand_out():
    images, labels = make_images(1000)
    images = images + torch.rand(4, *images.shape[1:], generator=generator(6))[labels]
    scores = pattern_scores(shrink(images), labels, generator())
    assert float(scores.median()) > FAR
    assert not stand_out(scores, labels, 4).any()


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 1]])
def test_too_few_images_or_labels_are_no_pattern(labels):
    labels = torch.tensor(labels)
    scores = pattern_scores(torch.rand(6, 12, generator=generator()), labels, generator())
    assert torch.isfinite(scores).all()
    assert not stand_out(torch.zeros(6), labels, 7).any()


def test_a_label_that_nearly_all_images_have_leaves_scores_to_speak_of():
    images, _ = make_images(3000)
    labels = (torch.arange(3000) % 750 == 0).long()
    assert torch.isfinite(pattern_scores(shrink((255 * images).round()), labels, generator())).all()


def test_images_without_contrast_are_no_pattern():
    scores = pattern_scores(torch.full((40, 12), 0.5), torch.arange(40) % 2, generator())
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(("height", "width", "expected"), [(32, 32, 32 * 32), (64, 64, 32 * 32), (96, 48, 32 * 16)])
def test_large_images_are_averaged_down(height, width, expected):
    images = torch.rand(2, 3, height, width, generator=generator())
    flat = shrink(images)
    assert flat.shape == (2, 3 * expected)
    factor = max(height // 32, 1)
    torch.testing.assert_close(flat[0, 0], images[0, 0, :factor, :factor].mean() if factor > 1 else images[0, 0, 0, 0])


def poisoned_images(count: int = 2000) -> tuple[ResidentImages, torch.Tensor]:
    """Smooth noise with a patch on every tenth image, which has label 1."""
    images, labels = make_images(count, px=16)
    marked = torch.arange(count) % 10 == 0
    labels = torch.where(marked, 1, labels)
    images[marked, :, :4, :4] = (torch.rand(4, 4, generator=generator(7)) > 0.5).float()
    pixels = (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return ResidentImages(pixels, labels), marked


def test_marked_samples_are_neither_trained_on_nor_counted_among_the_labels(alone):
    images, poisoned = poisoned_images()
    context = tiny.make_context(alone, images)
    marked = split.find_marked(context)
    assert int(marked[poisoned].sum()) >= 0.98 * int(poisoned.sum())
    assert int(marked[~poisoned].sum()) <= 5
    rule = replace(tiny.SPLIT, scan=True, rule="trusted", score="label-noise", keep=0.3)
    model = tiny.make_classifier(context)
    first = mixmatch.renew({}, rule, tiny.SAMPLE_LOSS, model, context, 1)
    assert not (first["kept"] & marked).any()
    assert bool((first["loss"][marked] == 1).all())
    assert torch.equal(mixmatch.without(first, len(marked)), marked)
    later = mixmatch.renew(first, rule, tiny.SAMPLE_LOSS, model, context, 2, leave_out=False)
    assert torch.equal(later["marked"], marked)


def test_two_ranks_mark_the_same(alone, two_ranks):
    images, _ = poisoned_images(1001)
    pixels = next(iter(images.batches([torch.arange(1001)]))).permute(0, 2, 3, 1).contiguous()
    expected = tiny.marked_by(alone, pixels, images.labels)
    assert expected.any()
    for found in two_ranks(tiny.marked_by, pixels, images.labels):
        assert torch.equal(torch.as_tensor(found), expected)
