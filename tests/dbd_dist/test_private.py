"""DPSGD against a loop over single images, and its guarantee against the formula."""

from __future__ import annotations

import copy
import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dbd_dist.cli import main
from dbd_dist.distributed.world import World
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.group_norm import has_batch_norm, replace_batch_norm
from dbd_dist.models.heads import Classifier
from dbd_dist.presets import PRESETS, preset
from dbd_dist.stages import DPSGD
from dbd_dist.stages.dpsgd import poisson_batches
from dbd_dist.stages.private import private_optimizer


@pytest.mark.parametrize(
    "network", [{"depths": (1, 1), "widths": (8, 16)}, {"block": "bottleneck", "depths": (1, 1), "widths": (4, 8)}]
)
def test_a_step_is_the_sum_of_clipped_gradients_plus_noise(network):
    torch.manual_seed(0)
    model = Classifier(ModelConfig(norm="group", **network), 4).double().to(memory_format=torch.channels_last)
    alone = copy.deepcopy(model)
    images = torch.randn(5, 3, 16, 16, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 3, 0])

    gradients = [
        torch.autograd.grad(F.cross_entropy(alone(image[None]), label[None]), list(alone.parameters()))
        for image, label in zip(images, labels)
    ]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in gradient)) for gradient in gradients]
    clip = sorted(norms)[2]  # two are longer
    sums = [torch.zeros_like(p) for p in alone.parameters()]
    for gradient, norm in zip(gradients, norms):
        for total, g in zip(sums, gradient):
            total += g * min(1.0, clip / norm)

    for noise in (0.0, 2.0):
        trained = copy.deepcopy(model)
        sgd = torch.optim.SGD(trained.parameters(), lr=1.0)
        each, optimizer = private_optimizer(trained, sgd, World(), clip=clip, noise=noise, expected_batch=8)
        optimizer.seed(7)
        for part in (slice(0, 3), slice(3, 5)):  # in two chunks
            F.cross_entropy(each(images[part]), labels[part], reduction="sum").backward()
            optimizer.signal_skip_step(do_skip=part.start == 0)
            optimizer.step()
            optimizer.zero_grad()
        drawn = torch.Generator().manual_seed(7)
        for before, after, total in zip(alone.parameters(), trained.parameters(), sums):
            extra = torch.randn(total.shape, generator=drawn, dtype=torch.float64) * noise * clip
            # Opacus adds 1e-6 to every norm
            torch.testing.assert_close(after, before - (total + extra) / 8, rtol=1e-5, atol=1e-5)


def test_batches_are_drawn_image_by_image():
    generator = torch.Generator().manual_seed(1)
    order, taken, longest = poisson_batches(50, 10, 400, generator, multiple=4)
    assert order.shape == taken.shape
    assert order.shape[1] % 4 == 0
    sizes = taken.sum(dim=1)
    assert longest == int(sizes.max()) <= order.shape[1] < longest + 4
    assert float(sizes.float().mean()) == pytest.approx(10, abs=0.6)  # Binomial(50, 0.2): 10, deviation 2.8 / 20
    assert float(sizes.float().var()) == pytest.approx(8, rel=0.3)
    for positions, full in zip(order, taken):
        assert len(set(positions[full].tolist())) == int(full.sum())
        assert not positions[~full].any()
    again = poisson_batches(50, 10, 400, torch.Generator().manual_seed(1), multiple=1)
    assert again[2] == longest
    assert torch.equal(again[0], order[:, :longest])


def test_the_guarantee_is_that_of_the_gaussian_mechanism():
    """Without subsampling: Renyi divergence steps * a / (2 noise^2) at order a (Mironov 2017, cor. 3), turned
    into (epsilon, delta) as by Balle et al. 2020, theorem 21."""
    stage, delta = DPSGD(epochs=40, batch=100, noise=8.0, delta=1e-5), 1e-5

    def epsilon(order: float) -> float:
        divergence = 40 * order / (2 * 8.0**2)
        return divergence - (math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)

    best = min(epsilon(1 + k / 1000) for k in range(1, 60_000))
    found = stage.privacy(100)
    assert found["epsilon"] == pytest.approx(best, rel=2e-3)
    assert found["delta"] == delta
    assert stage.privacy(1000)["epsilon"] < found["epsilon"] * 4  # ten times the steps, each of a tenth of the images


def test_group_norm_is_opacus_own_replacement():
    from opacus.validators import ModuleValidator

    with torch.device("cpu"):
        batch = ModelConfig(depths=(1, 1), widths=(24, 48)).build_backbone()
    theirs = ModuleValidator.fix(copy.deepcopy(batch))
    ours = copy.deepcopy(batch)
    replace_batch_norm(ours)
    assert not has_batch_norm(ours)
    pairs = [(a, b) for a, b in zip(ours.modules(), theirs.modules(), strict=True) if isinstance(b, nn.GroupNorm)]
    assert pairs
    for a, b in pairs:
        assert isinstance(a, nn.GroupNorm)
        assert (a.num_groups, a.num_channels) == (b.num_groups, b.num_channels)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_group_norm_for_it(name):
    config = preset(name).config("dpsgd")
    assert config.model.norm == "group"
    assert config.method.dpsgd.augment == preset(name).config("none").method.supervised.augment  # type: ignore[attr-defined]


def test_batch_norm_and_a_missing_library_are_refused_by_their_flags(tmp_path, capsys, monkeypatch):
    flags = ["train", "smoke", "--method", "dpsgd", "--launcher", "local", "--storage", str(tmp_path / "runs")]
    assert main([*flags, "--model.norm", "batch"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.norm: ")
    assert "Expected: group" in error
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "opacus" else find(name, *rest)
    )
    assert main(flags) == 2
    assert "Opacus is not installed" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
