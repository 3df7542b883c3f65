"""The networks against torchvision's."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from data_prep.errors import UserError
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(px: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, px, px, generator=generator())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("resnet18", ModelConfig(stem="imagenet")),
        ("resnet34", ModelConfig(stem="imagenet", depths=(3, 4, 6, 3))),
        ("resnet50", ModelConfig(stem="imagenet", block="bottleneck", depths=(3, 4, 6, 3))),
    ],
)
def test_backbone_with_the_weights_of_torchvision_gives_its_outputs(name, config):
    theirs = seeded(lambda: getattr(torchvision.models, name)(num_classes=7), generator(1))
    ours = Classifier(config, 7)
    weights = theirs.state_dict()
    head = {key: weights.pop(f"fc.{key}") for key in ("weight", "bias")}
    ours.backbone.load_state_dict(weights)  # strict: the names are the same, and so are the shapes
    ours.head.load_state_dict(head)
    batch = images(64)
    for mode in (True, False):  # batch statistics first: they move the running ones of both alike
        torch.testing.assert_close(ours.train(mode)(batch), theirs.train(mode)(batch), rtol=1e-4, atol=1e-4)


def test_stem_for_small_images_keeps_the_resolution():
    config = ModelConfig(depths=(1, 1, 1), widths=(8, 16, 32))
    backbone = config.build_backbone()
    assert (backbone.conv1.kernel_size, backbone.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(backbone.maxpool, nn.Identity)
    sides = []
    for stage in (1, 2, 3):
        backbone.get_submodule(f"layer{stage}").register_forward_hook(lambda *a: sides.append(tuple(a[2].shape[1:])))
    assert backbone(images(16)).shape == (2, 32)
    assert sides == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]


@pytest.mark.parametrize(
    ("config", "px"),
    [
        (ModelConfig(), 16),
        (ModelConfig(stem="imagenet"), 64),
        (ModelConfig(depths=(1, 1, 1), widths=(4, 4, 4)), 8),
        (ModelConfig(depths=(1,), widths=(4,)), 2),
        (ModelConfig(depths=(1, 1), widths=(4, 4), stem="imagenet", block="bottleneck"), 16),
    ],
)
def test_smallest_image_leaves_two_by_two_positions(config, px):
    assert config.min_image_px == px
    backbone = config.build_backbone().eval()
    shapes = []
    backbone.get_submodule(f"layer{len(config.widths)}").register_forward_hook(lambda *a: shapes.append(a[2].shape))
    with torch.no_grad():
        assert backbone(images(px)).shape == (2, config.feature_dim)
        backbone(images(px // 2))
    assert shapes[0][2:] == (2, 2)
    assert shapes[1][2:] == (1, 1)


def test_feature_dimensions():
    assert ModelConfig().feature_dim == 512
    assert ModelConfig(block="bottleneck").feature_dim == 2048


def test_projection_head_is_that_of_simclr():
    model = ContrastiveModel(ModelConfig(depths=(1,), widths=(8,), projection_dim=5))
    kinds = [type(module) for module in model.projection]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    batch = images(8, count=4)
    assert model(batch).shape == (4, 5)
    torch.testing.assert_close(model.eval()(batch), model.projection(model.backbone(batch)))


def test_seeded_weights_depend_on_the_generator_alone():
    def build() -> Classifier:
        return Classifier(ModelConfig(depths=(1,), widths=(4,)), 3)

    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = seeded(build, generator(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(17)  # the global state is another one now
    same, other = seeded(build, generator(5)), seeded(build, generator(6))
    for (name, value), again, different in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(value, again), name
        if "bn" not in name:  # those start at ones and zeros
            assert not torch.equal(value, different), name


def test_seeded_leaves_the_global_generator_alone_where_building_fails():
    def fail() -> nn.Module:
        torch.rand(3)
        raise RuntimeError

    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError):
        seeded(fail, generator(5))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"depths": (1, 1)}, "model.depths, model.widths"),
        ({"depths": (), "widths": ()}, "model.depths, model.widths"),
        ({"depths": (1, 0, 1, 1)}, "model.depths"),
        ({"widths": (8, 8, -1, 8)}, "model.widths"),
        ({"projection_dim": 0}, "model.projection_dim"),
    ],
)
def test_networks_that_cannot_be_built(options, where):
    with pytest.raises(UserError) as caught:
        ModelConfig(**options)
    assert str(caught.value.where) == where
