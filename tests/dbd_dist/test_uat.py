"""Unlearning of triggers: the perturbations it finds, and what training on them does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist.data import augment
from dbd_dist.stages import uat
from tests.dbd_dist import tiny

PLAIN = replace(tiny.UAT, augment=augment.none(), batch=48, perturbations=1)


def loss_of(model, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def planted(world):
    """Noise over stripes, squares and blocks, which tell the classes, and behind these images the same with a bright
    corner, which means class 0. Far more pixels tell a class than a perturbation can turn, as on photographs.

    Returns:
        The context of both together; of a model, what share of the other classes' images it takes for class 0 for
        their corner; and its accuracy on the images without one.
    """
    images = tiny.make_images(96)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    textures = torch.stack([y % 2, x % 2, (x + y) % 2, (x // 2 + y // 2) % 2])
    noise = next(images.batches([torch.arange(96)])).permute(0, 2, 3, 1) % 128
    pixels = noise + (128 * textures[images.labels]).to(torch.uint8)[..., None]
    labels = images.labels.clone()
    triggered = pixels.clone()
    triggered[:, :4, :4] = 255
    poisoned = tiny.ResidentImages(torch.cat([pixels, triggered]), torch.cat([labels, torch.zeros_like(labels)]))

    def classes(model, images: Tensor) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(augment.normalise(PLAIN.augment, images.permute(0, 3, 1, 2))).argmax(dim=1)

    def success(model) -> float:
        return float((classes(model, triggered[labels > 0]) == 0).float().mean())

    def accuracy(model) -> float:
        return float((classes(model, pixels) == labels).float().mean())

    return tiny.make_context(world, poisoned), success, accuracy


def test_a_shortened_perturbation_lies_on_the_ball_and_a_short_one_is_left():
    deltas = torch.stack([torch.full((3, 2, 2), 1.0), torch.full((3, 2, 2), 0.1)])
    found = uat.onto_ball(deltas, 2.0)
    torch.testing.assert_close(found[0], torch.full((3, 2, 2), 2.0 / 12**0.5))
    assert torch.equal(found[1], deltas[1])


def test_perturbations_take_turns_and_pixels_stay_in_range():
    views = augment.normalise(PLAIN.augment, torch.rand(6, 3, 4, 4).mul(255).to(torch.uint8))
    deltas = torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), -2.0)])
    mine = slice(3, 9)  # a rank that begins with the fourth image
    seen = uat.perturb(PLAIN, views, uat.take_turns(deltas, mine))
    mean, std = (torch.tensor(v)[:, None, None] for v in (PLAIN.augment.mean, PLAIN.augment.std))
    pixels = seen * std + mean
    for i in range(6):
        torch.testing.assert_close(pixels[i], torch.full((3, 4, 4), float((i + 3) % 2 == 0)), atol=1e-5, rtol=0)


def test_a_universal_perturbation_raises_the_loss_more_than_noise_of_its_size(alone):
    images = tiny.make_images()
    context = tiny.make_context(alone, images)
    model = tiny.make_classifier(context)
    tiny.run_supervised(replace(tiny.SUPERVISED, epochs=5), context, model)
    config = replace(PLAIN, ascent_steps=10, radius=6.0)
    (found,) = uat.find_perturbations(config, model, torch.arange(48), context, epoch=1)
    assert float(found.norm()) <= 3.0 + 1e-4  # half of 32 px: half the radius
    noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    views = augment.normalise(config.augment, next(images.batches([torch.arange(48)])))

    def through(delta: Tensor) -> float:
        return loss_of(model, uat.perturb(config, views, delta[None]), images.labels)

    assert through(found) > 1.5 * max(through(noise * found.norm() / noise.norm()), through(torch.zeros_like(found)))


def test_two_ranks_find_the_same_perturbations(alone, two_ranks):
    expected = tiny.perturbations(alone)
    for found in two_ranks(tiny.perturbations):
        torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("known", [1, 3, 20, 1000])
@pytest.mark.parametrize("batch", [2, 8, 128])
def test_half_of_the_images_get_a_pattern_and_every_pattern_its_share(known, batch):
    """Deltas are numbers here: perturbations from 0 on, patterns from 100 on."""
    perturbations = torch.arange(10.0).view(10, 1, 1, 1)
    patterns = torch.arange(100.0, 100.0 + known).view(known, 1, 1, 1)
    steps = -(-2 * 3 * known // batch)
    shown = torch.zeros(known)
    for step in range(steps):
        whole = slice(0, batch)
        ranks = [slice(0, batch // 2), slice(batch // 2, batch)]
        at_once, *parts = (
            uat.every_other(uat.take_turns(perturbations, mine), patterns, mine, step * batch).flatten()
            for mine in [whole, *ranks]
        )
        assert torch.equal(torch.cat(parts), at_once)
        assert torch.equal(at_once[0::2], torch.arange(0, batch, 2.0) % 10)
        assert (at_once[1::2] >= 100).all()
        shown += torch.bincount((at_once[1::2] - 100).long(), minlength=known)
    assert shown.sum() == steps * batch // 2
    assert shown.min() >= 3
    assert shown.max() - shown.min() <= 1


def test_patterns_are_the_means_of_marked_samples_less_that_of_the_others(alone, two_ranks):
    images = tiny.make_images(37)
    pixels = next(images.batches([torch.arange(37)])).numpy().astype(float) / 255
    groups: dict[int, list] = {0: [], 1: [], -1: []}
    for i, label in enumerate(images.labels.tolist()):
        groups[label if i % 5 == 0 and label < 2 else -1].append(pixels[i])
    expected = np.stack([np.mean(groups[label], axis=0) - np.mean(groups[-1], axis=0) for label in (0, 1)])
    found = tiny.patterns(alone)
    assert found is not None
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for other in two_ranks(tiny.patterns):
        assert np.array_equal(other, found)


def test_without_marked_samples_there_is_no_pattern(alone):
    images = tiny.make_images(37)
    assert uat.find_patterns(torch.zeros(37, dtype=torch.bool), tiny.make_context(alone, images)) is None


@pytest.mark.slow
def test_a_known_pattern_is_unlearnt_and_not_without_it(alone):
    """As in the test below, but with nothing to go by except the pattern: perturbations are too small."""
    context, success, accuracy = planted(alone)
    model = tiny.make_classifier(context)
    tiny.run_supervised(replace(tiny.SUPERVISED, epochs=15, augment=augment.none()), context, model)
    assert success(model) > 0.9
    start = {name: value.clone() for name, value in model.state_dict().items()}
    config = replace(PLAIN, epochs=10, steps=20, ascent_steps=1, lr=0.003, radius=1e-6, erase=0)
    after = []
    for known in (None, uat.find_patterns(torch.arange(192) >= 96, context)):
        model.load_state_dict(start)
        uat.train(config, model, torch.arange(192) < 96, known, context, None)
        after.append(success(model))
    assert after[1] < 0.3 < after[0]
    assert accuracy(model) > 0.9


@pytest.mark.slow
def test_a_planted_backdoor_is_unlearnt(alone):
    """Before, the corner decides; after, it does not, and the classes are told as well as before."""
    context, success, accuracy = planted(alone)
    model = tiny.make_classifier(context)
    tiny.run_supervised(replace(tiny.SUPERVISED, epochs=15, augment=augment.none()), context, model)
    before = success(model)
    config = replace(PLAIN, epochs=10, steps=20, ascent_steps=15, lr=0.003, radius=10.0, erase=0)
    uat.train(config, model, torch.arange(192) < 96, None, context, None)
    assert before > 0.9
    assert success(model) < 0.3
    assert accuracy(model) > 0.9


def test_squares_of_noise_lie_inside_and_leave_the_rest():
    config = replace(PLAIN, batch=9, erase=2)
    views = torch.full((6, 3, 12, 8), 5.0)
    seen = uat.erase(config, views, slice(3, 9), torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.augment.mean, config.augment.std))
    changed = (seen != 5.0).all(dim=1)
    assert torch.equal(changed, (seen != 5.0).any(dim=1))
    pixels = (seen * std + mean).permute(0, 2, 3, 1)[changed]
    assert 0 <= pixels.min() < 0.1
    assert 0.9 < pixels.max() <= 1
    for image in changed:  # two squares of 3 x 3, perhaps one over the other: some pair of places explains what is seen
        places = [(y, x) for y in range(10) for x in range(6) if image[y : y + 3, x : x + 3].all()]
        found = torch.zeros_like(image)
        for y, x in places:
            found[y : y + 3, x : x + 3] = True
        assert torch.equal(found, image)
        assert 9 <= int(image.sum()) <= 18
    whole = uat.erase(config, torch.full((9, 3, 12, 8), 5.0), slice(0, 9), torch.Generator().manual_seed(1))
    assert torch.equal(whole[3:], seen)  # a rank's part is that of the whole batch
