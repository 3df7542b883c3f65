"""ShrinkPad, NAD and the ablations: against slow forms of themselves, and which stages they share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.launch.local import run_local
from dbd_dist.losses import attention, attention_distance
from dbd_dist.methods import METHODS
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.feature_maps import layers, recorded
from dbd_dist.presets import PRESETS, preset
from dbd_dist.runtime.keys import stage_keys
from dbd_dist.stages import Distillation, Shrink
from dbd_dist.stages.shrink import ShrunkAndPadded

MINE = ("dbd-no-ssl", "ssl-ce", "ssl-sce", "ssl-sce-tuned", "dpsgd", "shrinkpad", "nad")


def configured(method: str, data: Path, **changes: dict[str, Any]) -> TrainConfig:
    """The smoke preset on a small data set, one process."""
    small = preset("smoke").change(
        simclr={"batch": 60}, warmup={"batch": 60}, supervised={"batch": 16}, mixmatch={"epochs": 1}
    )
    compute = replace(small.compute, workers=1, threads=1, precision="fp32")
    return replace(small.config(method), data=data, compute=compute, evaluate_every=0)


# -- what is shared


def test_methods_share_stages_by_hash(with_holdout):
    dataset = open_dataset(with_holdout)
    keys = {name: stage_keys(configured(name, with_holdout), dataset, bf16=False) for name in (*MINE, "none", "dbd")}
    for name in ("shrinkpad", "nad", "dbd-no-ssl"):
        assert keys[name]["supervised"] == keys["none"]["supervised"], name
    for name in ("ssl-ce", "ssl-sce", "ssl-sce-tuned"):
        assert keys[name]["simclr"] == keys["dbd"]["simclr"], name
    for name in ("ssl-sce", "ssl-sce-tuned"):
        assert keys[name]["warmup"] == keys["dbd"]["warmup"], name
    assert len({keys[name]["warmup"] for name in ("dbd", "ssl-ce", "dbd-no-ssl")}) == 3
    assert keys["shrinkpad"].keys() == {"supervised"}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", MINE)
def test_every_preset_has_settings_for_every_method(name, method):
    config = preset(name).config(method)
    assert config.method.name == method
    assert config.normalise == preset(name).config("none").normalise


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def results(storage, with_holdout) -> dict[str, dict[str, Any]]:
    """Results of all of them in one storage, in this order."""
    found = {}
    for name in ("none", "shrinkpad", "nad", "dbd-no-ssl", "ssl-sce", "dbd", "ssl-sce-tuned", "ssl-ce", "dpsgd"):
        found[name] = run_local(configured(name, with_holdout), storage=storage, name=name, quiet=True)
    return found


@pytest.mark.slow
def test_each_shared_stage_is_trained_once(results, storage):
    reused = {name: result["reused_stages"] for name, result in results.items()}
    assert reused == {
        "none": [],
        "shrinkpad": ["supervised"],
        "nad": ["supervised"],
        "dbd-no-ssl": ["supervised"],
        "ssl-sce": [],
        "dbd": ["simclr", "warmup"],
        "ssl-sce-tuned": ["simclr", "warmup"],
        "ssl-ce": ["simclr"],
        "dpsgd": [],
    }
    assert [name for name, result in results.items() if result["needs_clean"]] == ["nad"]
    measures = results["dpsgd"]["measures"]
    assert measures["delta"] == 1e-5
    assert measures["epsilon"] > 0
    assert "measures" not in results["none"]


@pytest.mark.slow
def test_the_ablation_keeps_what_the_first_split_of_dbd_keeps(results, storage):
    tuned, whole = (pq.read_table(storage / name / "split.parquet") for name in ("ssl-sce-tuned", "dbd"))
    assert tuned["kept"].to_pylist() == whole["first_kept"].to_pylist()


@pytest.mark.slow
def test_the_ranking_of_methods_without_a_split_is_that_of_the_first_split_of_dbd(results, storage, capsys, tmp_path):
    ranking, whole = (pq.read_table(storage / name) for name in ("ssl-sce/ranking.parquet", "dbd/split.parquet"))
    for column in ("loss", "first_loss"):
        assert ranking[column].to_pylist() == whole["first_loss"].to_pylist()
    for column in ("kept", "first_kept"):
        assert ranking[column].to_pylist() == whole["first_kept"].to_pylist()
    names = [str(storage / name) for name in ("ssl-sce", "ssl-ce", "none")]
    assert main(["report", *names, "--figures", str(tmp_path / "f")]) == 0
    text = (tmp_path / "f" / "losses.svg").read_text()
    assert "symmetric cross-entropy (SCE), AUROC" in text
    assert ">cross-entropy (CE), AUROC" in text
    assert not (storage / "dbd" / "ranking.parquet").exists()


@pytest.mark.slow
def test_methods_without_a_split_say_how_well_their_loss_ranks(results):
    first = results["dbd"]["split_quality"]["first"]
    assert results["ssl-sce"]["split_quality"] == {"first": first}
    assert results["ssl-ce"]["split_quality"].keys() == {"first"}
    assert results["ssl-ce"]["split_quality"]["first"] != first
    for name in ("ssl-sce", "ssl-ce"):
        assert results[name]["kept"] is None
    assert not any("split_quality" in results[name] for name in ("none", "shrinkpad", "nad", "dpsgd"))


@pytest.mark.slow
def test_an_exported_model_is_measured_with_what_the_method_does_to_images(results, storage, capsys):
    for name in ("shrinkpad", "dpsgd"):
        assert main(["evaluate", str(storage / name)]) == 0
        assert f'"clean_acc": {results[name]["clean_acc"]}' in capsys.readouterr().out


# -- ShrinkPad


class ByPlace(nn.Module):
    """A linear classifier of pixels, so that places matter."""

    def __init__(self, side: int):
        super().__init__()
        self.head = nn.Linear(3 * side * side, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


def test_shrinking_and_padding_by_hand():
    mean, std, side, px = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16, 3
    torch.manual_seed(0)
    model, images = ByPlace(side), torch.rand(3, 3, side, side)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    wrapped = ShrunkAndPadded(model, Shrink(px=px, draws=4, seed=2), mean, std)
    found = wrapped(normalised)
    places = torch.randint(px + 1, (4, 2), generator=seeds.generator(2, "shrink")).tolist()
    assert len({tuple(place) for place in places}) > 1
    for image, answer in zip(images, found):
        total = torch.zeros(4)
        for top, left in places:
            canvas = torch.zeros(3, side, side)  # black, before it is normalised
            small = F.interpolate(image[None], size=(side - px, side - px), mode="bilinear", antialias=True)[0]
            canvas[:, top : top + side - px, left : left + side - px] = small
            seen = (canvas - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            total += model(seen[None])[0].softmax(dim=0)
        torch.testing.assert_close(answer, (total / 4).log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wrapped(normalised[1:2])[0], found[1])  # whatever else is asked about


def test_an_eighth_of_the_image_unless_given():
    images = torch.rand(2, 3, 32, 32)
    seen = []
    model = nn.Identity()
    model.forward = lambda x: seen.append(x) or x.mean(dim=(2, 3))  # type: ignore[method-assign]
    ShrunkAndPadded(model, Shrink(draws=1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(images)
    black = (seen[0] == 0).all(dim=(0, 1))
    assert int((~black).any(dim=1).sum()) == 28


# -- attention


def test_attention_by_hand():
    maps = torch.randn(2, 5, 3, 4)
    expected = np.zeros((2, 12))
    for image in range(2):
        for y in range(3):
            for x in range(4):
                expected[image, 4 * y + x] = sum(abs(float(v)) ** 2 for v in maps[image, :, y, x])
        expected[image] /= np.sqrt((expected[image] ** 2).sum())
    np.testing.assert_allclose(attention(maps).numpy(), expected, rtol=1e-5)
    other = torch.randn(2, 7, 3, 4)  # channels need not be as many
    difference = expected - attention(other).numpy()
    assert float(attention_distance(maps, other)) == pytest.approx((difference**2).mean(), rel=1e-5)
    assert float(attention_distance(maps, 3 * maps)) == pytest.approx(0, abs=1e-12)


def test_layers_are_the_last_of_each_resolution():
    backbone = ModelConfig(depths=(1, 1, 1), widths=(4, 8, 16)).build_backbone()
    assert layers(backbone, 16) == ("layer1", "layer2", "layer3")
    with recorded(backbone, ("layer2",)) as seen:
        backbone(torch.rand(2, 3, 16, 16))
        assert seen["layer2"].shape == (2, 8, 8, 8)
    seen.clear()
    backbone(torch.rand(2, 3, 16, 16))
    assert seen == {}  # nothing is left behind
    flat = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    assert layers(flat, 4) == ()


def test_a_network_without_feature_maps_is_refused():
    with pytest.raises(UserError, match="has no feature maps"):
        Distillation().check_network(ModelConfig(backbone="timm:vit_tiny_patch16_224"))


# -- bad input


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "ssl-ce", "--warmup.loss", "sce"], "warmup.loss: "),
        (["--method", "ssl-sce", "--warmup.loss", "ce"], "warmup.loss: "),
        (["--method", "shrinkpad", "--shrink.draws", "0"], "shrink.draws: "),
        (["--method", "shrinkpad", "--shrink.px", "16", "--data", "{data}"], "shrink.px: "),
        (["--method", "nad", "--data", "{data}"], "--holdout-clean 0.05"),
        (["--method", "nda"], "nad"),
    ],
)
def test_mistakes_are_named_before_anything_runs(flags, says, digits, tmp_path, capsys):
    flags = [flag.format(data=digits) for flag in flags]
    assert main(["train", "smoke", *flags, "--launcher", "local", "--storage", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "runs").exists()


def test_all_of_them_are_listed():
    assert set(MINE) <= set(METHODS)
