"""The backbones against formulas and slow copies of their papers' equations; backbones of installed packages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import cli
from dbd_dist.models import BACKBONES, OWN
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.exported import read_exported
from dbd_dist.models.folded import folded
from dbd_dist.models.heads import Classifier, seeded
from dbd_dist.models.preact_resnet import PreActNetwork

NAMES = ("resnet", "resnet18", "resnet34", "resnet50", "preact_resnet18", "wide_resnet28_2", "timm:regnety_002")
"""Every backbone; the last one's batch norms hold their activations."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(px: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, px, px, generator=generator())


def test_every_backbone_is_tested():
    assert {name.partition(":")[0] for name in NAMES} == set(OWN)


def conv(channels: int, width: int, side: int) -> int:
    return channels * width * side * side


def basic(channels: int, width: int, *, changes: bool) -> int:
    """Parameters of a basic block, by hand."""
    count = conv(channels, width, 3) + 2 * width + conv(width, width, 3) + 2 * width
    return count + (conv(channels, width, 1) + 2 * width if changes else 0)


def bottleneck(channels: int, width: int, *, changes: bool) -> int:
    count = conv(channels, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1) + 2 * (width + width)
    return count + 8 * width + (conv(channels, 4 * width, 1) + 8 * width if changes else 0)


def preact(channels: int, width: int, *, changes: bool) -> int:
    count = 2 * channels + conv(channels, width, 3) + 2 * width + conv(width, width, 3)
    return count + (conv(channels, width, 1) if changes else 0)


def stages(block, stem: int, depths: tuple[int, ...], widths: tuple[int, ...], expansion: int = 1) -> int:
    count, channels = 0, stem
    for stage, (depth, width) in enumerate(zip(depths, widths)):
        for i in range(depth):
            changes = channels != expansion * width or (stage > 0 and i == 0)
            count += block(channels, width, changes=changes)
            channels = expansion * width
    return count


WIDE = (64, 128, 256, 512)


@pytest.mark.parametrize(
    ("name", "formula", "with_ten_classes"),
    [
        ("resnet18", conv(3, 64, 3) + 128 + stages(basic, 64, (2, 2, 2, 2), WIDE), 11_173_962),
        ("resnet34", conv(3, 64, 3) + 128 + stages(basic, 64, (3, 4, 6, 3), WIDE), 21_282_122),
        ("resnet50", conv(3, 64, 3) + 128 + stages(bottleneck, 64, (3, 4, 6, 3), WIDE, 4), 23_520_842),
        ("preact_resnet18", conv(3, 64, 3) + stages(preact, 64, (2, 2, 2, 2), WIDE), 11_171_146),
        ("wide_resnet28_2", conv(3, 16, 3) + stages(preact, 16, (4, 4, 4), (32, 64, 128)) + 256, 1_467_610),
    ],
)
def test_number_of_parameters(name, formula, with_ten_classes):
    """By formula, and with the head as others state it for these networks."""
    with torch.device("meta"):
        model = Classifier(ModelConfig(backbone=name), 10)
    assert sum(p.numel() for p in model.backbone.parameters()) == formula
    assert sum(p.numel() for p in model.parameters()) == with_ten_classes


@pytest.mark.parametrize("name", NAMES)
def test_sizes_hold_on_the_meta_device(name):
    config = ModelConfig(backbone=name)
    with torch.device("meta"):
        model = Classifier(config, 3)
        assert model.backbone(torch.empty(2, 3, config.min_image_px, config.min_image_px)).shape == (
            2,
            config.feature_dim,
        )
    assert {p.device.type for p in model.state_dict().values()} == {"meta"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layout_and_synchronised_batch_norm_change_nothing(name):
    """channels_last, and torch's SyncBatchNorm, which in eval mode runs on the CPU."""
    config = ModelConfig(backbone=name)
    network = seeded(config.build_backbone, generator(1))
    batch = images(config.min_image_px, count=4)
    first, second = network(batch), network(batch)  # moves the running statistics, not the batch's
    torch.testing.assert_close(first, second)
    wanted = network.eval()(batch)
    assert not torch.allclose(wanted, first, rtol=0.01)
    laid_out = network.to(memory_format=torch.channels_last)(batch.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(laid_out, wanted, rtol=1e-3, atol=1e-4)
    norms = sum(type(m) is nn.BatchNorm2d for m in network.modules())  # a subclass would lose what it adds
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in network.modules()) == norms
    torch.testing.assert_close(network(batch), wanted, rtol=1e-3, atol=1e-4)


def norm_relu(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Normalise a batch by its own statistics, channel by channel, then ReLU."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        channel = x[:, c]
        std = (channel.var(correction=0) + 1e-5).sqrt()
        out[:, c] = (channel - channel.mean()) / std * state[f"{name}.weight"][c] + state[f"{name}.bias"][c]
    return torch.where(out > 0, out, 0.0)


def slow_preact(state: dict[str, Tensor], x: Tensor, depths: tuple[int, ...]) -> Tensor:
    """Equations 1 and 3 of He et al. 2016b, one block after the other."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            active = norm_relu(x, state, f"{name}.bn1")
            residual = F.conv2d(active, state[f"{name}.conv1.weight"], padding=1, stride=stride)
            residual = F.conv2d(norm_relu(residual, state, f"{name}.bn2"), state[f"{name}.conv2.weight"], padding=1)
            shortcut = state.get(f"{name}.shortcut.0.weight")
            x = residual + (x if shortcut is None else F.conv2d(active, shortcut, stride=stride))
    if "bn1.weight" in state:
        x = norm_relu(x, state, "bn1")
    return x.flatten(2).mean(2)


@pytest.mark.parametrize("final_norm", [False, True])
def test_preactivation_against_the_papers_equations(final_norm):
    """Of both networks that are made of its blocks: without and with a last batch norm, wider than the stem or not."""
    depths = (2, 1, 2)
    widths = (12, 6, 8) if final_norm else (6, 6, 8)
    network = PreActNetwork(stem=6, depths=depths, widths=widths, final_norm=final_norm).double()
    for name, value in network.named_parameters():
        if "bn" in name:  # away from ones and zeros
            nn.init.uniform_(value, 0.5, 1.5, generator=generator(2))
    batch = images(8, count=3).double()
    torch.testing.assert_close(network(batch), slow_preact(network.state_dict(), batch, depths))


def test_shapes_of_the_papers():
    wide = ModelConfig(backbone="wide_resnet28_2").build_backbone()
    assert [wide.get_submodule(f"layer{i}.3.conv2").out_channels for i in (1, 2, 3)] == [32, 64, 128]
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in wide.modules()) == 25  # 28 less 3 of 1x1
    narrow = ModelConfig(backbone="preact_resnet18").build_backbone()
    assert [narrow.get_submodule(f"layer{i}.1.conv2").out_channels for i in (1, 2, 3, 4)] == [64, 128, 256, 512]
    assert "layer1.0.shortcut.0.weight" not in narrow.state_dict()


@pytest.mark.slow
def test_network_compiles_as_one_graph():
    network = ModelConfig(backbone="wide_resnet28_2").build_backbone().eval()
    batch = images(16)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), network(batch))


# -- backbones of installed packages

PLUGIN = """
from dataclasses import dataclass
from torch import nn

@dataclass(frozen=True)
class Pooled:
    stem: str
    feature_dim: int = 12
    min_image_px: int = 4
    def build(self):
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Lacking:
    feature_dim = 12
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with two backbones, one that is good, as if it were installed."""
    (tmp_path / "pooled_backbones.py").write_text(PLUGIN)
    about = tmp_path / "pooled_backbones-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pooled-backbones\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[dbd_dist.backbones]\npooled = pooled_backbones:Pooled\nlacking = pooled_backbones:Lacking\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(BACKBONES, "_all", None)
    monkeypatch.setattr(BACKBONES, "refused", {})
    yield
    sys.modules.pop("pooled_backbones", None)


def test_backbone_of_a_package_is_trained_from_given_weights_and_exported(plugin, smoke_config, tmp_path, capsys):
    """With a learning rate of almost nothing, the backbone's weights at the end are the given ones."""
    config = ModelConfig(backbone="pooled", projection_dim=64)
    wanted = seeded(lambda: Classifier(config, 10), generator(9))
    torch.save(wanted.state_dict(), tmp_path / "given")
    flags = [
        "train", "smoke", "--data", str(smoke_config.data), "--storage", str(tmp_path), "--launcher", "local",
        "--name", "run", "--method", "none", "--supervised.epochs", "1", "--supervised.lr", "1e-12",
        "--model.backbone", "pooled",
    ]  # fmt: skip
    assert cli.main([*flags, "--model.weights", str(tmp_path / "given")]) == 0
    assert f"note: {tmp_path / 'given'}: left out 2: head.weight, head.bias" in capsys.readouterr().err
    exported = read_exported(tmp_path / "run" / "model.safetensors")
    assert exported.network == config
    network = exported.build(torch.device("cpu"))
    assert isinstance(network, Classifier)
    for name, value in wanted.backbone.named_parameters():
        torch.testing.assert_close(network.backbone.get_parameter(name), value)
    assert not torch.equal(network.head.weight, wanted.head.weight)  # the head is the run's own
    assert "weights" not in json.loads((tmp_path / "run" / "model.json").read_text())["network"]
    assert cli.main(flags) == 2  # without them it is another run
    assert "another configuration" in capsys.readouterr().err


def test_backbone_of_a_package_that_lacks_something(plugin):
    with pytest.raises(UserError, match=r"pooled-backbones: entry point lacking.* no build, min_image_px"):
        ModelConfig(backbone="lacking")
    assert ModelConfig(backbone="pooled", stem="imagenet").architecture.feature_dim == 12


def test_backbone_with_a_field_that_no_flag_gives(monkeypatch):
    @dataclass(frozen=True)
    class Needing:
        height: int
        feature_dim: int = 3
        min_image_px: int = 1

        def build(self) -> nn.Module:
            raise NotImplementedError

    monkeypatch.setitem(OWN, "needing", Needing)
    with pytest.raises(UserError, match="fields that no flag gives: height"):
        ModelConfig(backbone="needing")


def test_flags_of_another_shape_are_one_message(tmp_path, capsys):
    code = cli.main(["train", "smoke", "--storage", str(tmp_path), "--model.backbone", "resnet18",
                     "--model.depths", "1", "1", "1", "1"])  # fmt: skip
    assert code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "model.depths: resnet18 has a shape of its own" in message


# -- batch norm that is folded


def trained(name: str) -> Classifier:
    """With statistics and weights of batch norm that are not those of the start."""
    model = seeded(lambda: Classifier(ModelConfig(backbone=name), 5), generator(3))
    drawn = generator(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0), (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):  # fmt: skip
                assert values is not None
                values.data.uniform_(low, high, generator=drawn)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_folded_batch_norm_computes_the_same(name):
    plain = trained(name).double()  # in float32 rounding lets a ReLU here and there change sides
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    fewer = folded(plain)
    there, left = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (plain, fewer)]
    assert left < there or name.startswith("timm:")  # whose batch norms are of a kind of its own
    outputs, slopes = [], []
    for model in (plain, fewer):
        x = images(32).double().requires_grad_()
        outputs.append(model(x))
        (slope,) = torch.autograd.grad(outputs[-1].square().sum(), x)
        slopes.append(slope)
    for one, other in (outputs, slopes):
        torch.testing.assert_close(other, one)
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert not any(p.requires_grad for p in fewer.parameters())


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    odd = Odd().eval()
    assert folded(odd) is odd
