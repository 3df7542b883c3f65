"""The networks against torchvision's; the configuration."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from data_prep.errors import UserError
from dbd_dist.config import TrainConfig, override
from dbd_dist.fields import digest, from_dict, to_dict
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
        pytest.param(
            "resnet50",
            ModelConfig(stem="imagenet", block="bottleneck", depths=(3, 4, 6, 3)),
            marks=pytest.mark.slow,
        ),
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


# -- the configuration

DEMO = ModelConfig(depths=(1, 1, 1), widths=(16, 32, 64), projection_dim=64)
OLD = {
    "block": "basic", "depths": [2, 2, 2, 2], "widths": [64, 128, 256, 512], "stem": "cifar", "projection_dim": 128,
}  # fmt: skip
"""A network as descriptions from before there was a choice of backbones have it."""


def test_old_descriptions_and_hashes_stay_valid():
    assert from_dict(ModelConfig, OLD) == ModelConfig()
    assert to_dict(ModelConfig()) == OLD
    assert digest(ModelConfig()) == "756da576ca9547e6"
    assert digest(DEMO) == "6882b726f38f1a63"
    assert digest(ModelConfig(stem="imagenet")) == "a3b429b04d3f464d"


def test_weights_are_drawn_as_before():
    """The first and the last draws of two networks, noted before there was a choice of backbones."""
    model = seeded(lambda: Classifier(DEMO, 10), generator(5))
    found = [model.backbone.conv1.weight.flatten()[0].item(), model.head.bias[-1].item()]
    assert found == pytest.approx([0.10331524, -0.06433165])
    config = ModelConfig(depths=(1, 2), widths=(8, 16), block="bottleneck")
    model = seeded(lambda: ContrastiveModel(config), generator(5))
    found = [model.backbone.conv1.weight.flatten()[0].item(), model.projection[3].bias[-1].item()]
    assert found == pytest.approx([0.16724485, 0.05726148])


def test_unused_fields_are_not_written():
    config = ModelConfig(backbone="resnet50", stem="imagenet", projection_dim=64)
    assert to_dict(config) == {"stem": "imagenet", "projection_dim": 64, "backbone": "resnet50"}
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert to_dict(config, every_field=True).keys() == {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize(
    ("options", "where", "words"),
    [
        ({"backbone": "resnet18", "depths": (1, 1, 1, 1)}, "model.depths", "resnet18 has a shape of its own"),
        ({"backbone": "resnet50", "block": "bottleneck"}, "model.block", "takes no block"),
        ({"backbone": "wide_resnet28_2", "stem": "imagenet", "widths": (8,)}, "model.widths, model.stem", "takes no"),
        ({"backbone": "resnet81"}, "model.backbone", "did you mean 'resnet18'"),
        ({"backbone": "resnet18:x"}, "model.backbone", "Expected: resnet18."),
        ({"backbone": "timm"}, "model.backbone", "Expected: timm:NAME."),
        ({"backbone": "timm:regnety_0002"}, "model.backbone", "did you mean regnety_002"),
        ({"backbone": "timm:hf-hub:timm/resnet18"}, "model.backbone", "timm has no network"),
        ({"backbone": ""}, "model.backbone", "there is no backbone ''"),
    ],
)
def test_backbones_that_are_refused(options, where, words):
    with pytest.raises(UserError) as caught:
        ModelConfig(**options)
    assert str(caught.value.where) == where
    assert words in str(caught.value)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'dbd-dist\[timm\]'"):
        ModelConfig(backbone="timm:resnet18")


def test_image_sizes_that_do_not_fit(tmp_path):
    ModelConfig().check_image_px(16, tmp_path)
    with pytest.raises(UserError, match="images of 15 px are too small for the backbone resnet of 4 stages"):
        ModelConfig().check_image_px(15, tmp_path)
    with pytest.raises(UserError, match="at least 64 px"):
        ModelConfig(backbone="timm:regnety_002").check_image_px(32, tmp_path)
    fixed = ModelConfig(backbone="timm:vit_tiny_patch16_224")
    fixed.check_image_px(224, tmp_path)
    for px, size in ((64, "small"), (256, "large")):
        with pytest.raises(UserError, match=rf"too {size} for the backbone timm:vit_tiny.*Expected: 224 px"):
            fixed.check_image_px(px, tmp_path)


def test_another_backbone_for_a_preset():
    """A preset's depths are those of its own backbone; what the other one takes as well stays."""
    demo = TrainConfig(model=DEMO)
    assert override(demo, {"model.backbone": "resnet34"}).model == ModelConfig(backbone="resnet34", projection_dim=64)
    assert override(demo, {"model.backbone": "resnet"}) == demo
    large = ModelConfig(stem="imagenet")
    assert large.with_backbone("resnet50").stem == "imagenet"
    assert large.with_backbone("preact_resnet18").stem == "cifar"
    assert override(demo, {"model.backbone": "preact_resnet18"}).model.backbone == "preact_resnet18"
    assert override(demo, {"model.projection_dim": 8}).model == replace(DEMO, projection_dim=8)
