"""Weights that a user gives: read from every form that they come in, or refused in one message."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import cli
from dbd_dist.config import TrainConfig
from dbd_dist.models import given
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.given import check_weights, load_backbone_weights, model_key, read_given, weights_digest
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded
from dbd_dist.runtime.keys import method_hash

CONFIG = ModelConfig(depths=(1, 1), widths=(4, 8), projection_dim=4)


def trained() -> Classifier:
    """A classifier whose every tensor, counts and statistics among them, is unlike a fresh one's."""
    model = seeded(lambda: Classifier(CONFIG, 3), torch.Generator().manual_seed(7))
    model(torch.rand(4, 3, 8, 8))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.1, 0.9)
    return model


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(trained().backbone.state_dict())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def saved(content: object, path: Path) -> ModelConfig:
    torch.save(content, path)
    return replace(CONFIG, weights=path)


def refusal(config: ModelConfig) -> str:
    with pytest.raises(UserError) as caught:
        weights_digest(config)
    assert caught.value.where == config.weights
    return str(caught.value)


def same(found: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in found.state_dict().items())


# -- what is read


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"backbone": s}},
        lambda s: {f"module.{name}": value for name, value in s.items()},
        lambda s: {"state_dict": {f"module.encoder.{name}": value for name, value in s.items()}},
        lambda s: {f"_orig_mod.backbone.{name}": value for name, value in s.items()},
        lambda s: {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10), **s},
        lambda s: {name: nn.Parameter(value, requires_grad=False) for name, value in s.items()},
        lambda s: {name: value for name, value in s.items() if "num_batches" not in name},
    ],
)
def test_state_dicts_of_other_programs(state, file, wrapped):
    config = saved(wrapped(state), file)
    backbone = config.build_backbone()
    load_backbone_weights(config, backbone)
    if not any("num_batches" in str(entry) for entry in torch.load(file)):  # wrapped, or left out on purpose
        state = {n: v for n, v in state.items() if "num_batches" not in n} | {
            n: v for n, v in backbone.state_dict().items() if "num_batches" in n
        }
    assert same(backbone, state)


def test_old_and_new_form_and_safetensors_give_one_hash(state, file, tmp_path):
    config = saved(state, file)
    wanted = weights_digest(config)
    assert wanted is not None
    assert len(wanted) == 64
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file({f"backbone.{name}": value for name, value in state.items()}, tmp_path / "named.pt")
    for name in ("old", "named.pt"):
        assert weights_digest(replace(config, weights=tmp_path / name)) == wanted
        assert model_key(replace(config, weights=tmp_path / name)) == model_key(config)
    state["conv1.weight"] = state["conv1.weight"].clone()
    state["conv1.weight"][0, 0, 0, 0] += 1e-3
    assert weights_digest(saved(state, file)) != wanted  # in the same place


def test_weights_that_a_run_exports(file, capsys):
    for model in (trained(), ContrastiveModel(CONFIG)):
        save_file(model.state_dict(), file)
        config = replace(CONFIG, weights=file)
        backbone = CONFIG.build_backbone()
        load_backbone_weights(config, backbone)
        assert same(backbone, model.backbone.state_dict())
    check_weights(config)
    note = capsys.readouterr().err
    assert note.startswith(f"note: {file}: left out 9: projection.")
    assert note.count("\n") == 1


def test_other_precisions_become_the_networks_own(state, file):
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    backbone = CONFIG.build_backbone()
    load_backbone_weights(saved(halves, file), backbone)
    assert same(backbone, {name: value.float() for name, value in halves.items()})
    assert backbone.conv1.weight.dtype == torch.float32


def test_names_of_timm(tmp_path):
    """Its own file holds names that our network has in state dicts only."""
    import timm

    config = ModelConfig(backbone="timm:regnety_002", weights=tmp_path / "regnet.safetensors")
    theirs = timm.create_model("regnety_002", num_classes=5)
    save_file(theirs.state_dict(), config.weights)
    ours = config.build_backbone()
    load_backbone_weights(config, ours)
    batch = torch.rand(2, 3, 64, 64)
    wanted = theirs.eval().forward_head(theirs.forward_features(batch), pre_logits=True)
    torch.testing.assert_close(ours.eval()(batch), wanted)


def test_nothing_given_changes_nothing():
    backbone = trained().backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    load_backbone_weights(CONFIG, backbone)
    check_weights(CONFIG)
    assert same(backbone, before)
    assert weights_digest(CONFIG) is None
    assert "weights" not in model_key(CONFIG)


def test_hash_of_a_run_depends_on_the_weights_and_not_on_their_place(state, file, tmp_path):
    config, elsewhere = saved(state, file), saved(state, tmp_path / "elsewhere")
    assert method_hash(TrainConfig(model=config)) == method_hash(TrainConfig(model=elsewhere))
    assert method_hash(TrainConfig(model=config)) != method_hash(TrainConfig(model=CONFIG))
    assert model_key(config) != model_key(CONFIG)


def test_path_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(weights=Path("here.pt")).weights == tmp_path / "here.pt"


# -- what is refused


def test_mismatches_name_the_tensors(state, file):
    del state["bn1.weight"]
    state["layer3.0.conv1.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(4, 3, 7, 7)
    message = refusal(saved(state, file))
    assert "missing 1: bn1.weight;" in message
    assert "unexpected 1: layer3.0.conv1.weight;" in message
    assert "of another shape 1: conv1.weight (4, 3, 7, 7) in place of (4, 3, 3, 3)" in message
    message = refusal(saved({f"x{i}": torch.zeros(1) for i in range(12)}, file))
    assert "unexpected 12: x0, x1, x2, x3, x4, x5, x6, x7, x8, x9 and 2 more" in message
    assert message.count("layer") <= 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(state, file, value):
    state["layer1.0.bn1.running_var"][0] = value
    assert "layer1.0.bn1.running_var are not finite" in refusal(saved(state, file))


def test_values_beyond_the_networks_precision(state, file):
    state["conv1.weight"] = state["conv1.weight"].double() * 1e300
    assert "conv1.weight are not finite in torch.float32" in refusal(saved(state, file))


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_values_of_another_kind(state, file, kind):
    state["conv1.weight"] = state["conv1.weight"].to(kind)
    assert f"conv1.weight is {kind}" in refusal(saved(state, file))


def test_tensors_that_claim_more_than_the_file_holds(state, file):
    """Ten million million values over one in the file: the shape alone is looked at."""
    state["conv1.weight"] = torch.zeros(1).expand(10**13)
    assert "(10000000000000,) in place of" in refusal(saved(state, file))
    state["conv1.weight"] = torch.zeros(4, 3, 3, 3).to_sparse()
    assert "holds no state dict" in refusal(saved(state, file))


@pytest.mark.parametrize(
    "content", [{}, [], "text", {"epoch": 3}, {1: torch.zeros(1)}, {"state_dict": {}}, torch.zeros(3)]
)
def test_files_without_a_state_dict(file, content):
    assert "holds no state dict" in refusal(saved(content, file))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_code_is_not_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for modern in (True, False):
        torch.save({"conv1.weight": Evil()}, file, _use_new_zipfile_serialization=modern)
        assert "expected weights" in refusal(replace(CONFIG, weights=file))
    assert not (tmp_path / "made-by-a-pickle").exists()


def test_files_that_are_none_of_weights(state, file, tmp_path, monkeypatch):
    for content in (b"", b"text", b"\x80\x02", b"PK\x03\x04", b"\xff" * 100, b"\0\0\0\0\0\0\0\x7f{}"):
        file.write_bytes(content)
        assert "Expected: safetensors, or a state dict" in refusal(replace(CONFIG, weights=file))
    for missing in (tmp_path / "nothing", tmp_path / "nothing" / "below"):
        assert "cannot be read" in refusal(replace(CONFIG, weights=missing))
    assert "cannot be read" in refusal(replace(CONFIG, weights=tmp_path))
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(replace(CONFIG, weights=tmp_path / "pipe"))
    torch.save(state, file)
    monkeypatch.setattr(given, "MAX_BYTES", 100)
    assert "at most 100 bytes" in refusal(replace(CONFIG, weights=file))


def test_truncated_files(state, file, tmp_path):
    torch.save(state, file)
    save_file(state, tmp_path / "whole")
    for path in (file, tmp_path / "whole"):
        whole = path.read_bytes()
        for length in (8, 9, 60, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError):
                read_given(replace(CONFIG, weights=path))


def test_compressed_archives(state, file, tmp_path):
    torch.save({"conv1.weight": torch.zeros(10**6)}, tmp_path / "whole")
    with zipfile.ZipFile(tmp_path / "whole") as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    assert "compressed" in refusal(replace(CONFIG, weights=file))


# -- the command


def test_weights_are_refused_before_the_data_is_prepared(tmp_path, capsys):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "given")
    code = cli.main(["train", "smoke", "--storage", str(tmp_path / "runs"), "--model.weights", str(tmp_path / "given")])
    assert code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "these are not weights of the backbone resnet" in message
    assert not (tmp_path / "runs").exists()


def test_given_weights_in_place_of_pretraining(smoke_config, tmp_path, capsys):
    """No epoch of SimCLR: what the stage hands on are the given weights."""
    wanted = seeded(smoke_config.model.build_backbone, torch.Generator().manual_seed(9))
    torch.save(wanted.state_dict(), tmp_path / "given")
    flags = [
        "train", "smoke", "--data", str(smoke_config.data), "--storage", str(tmp_path), "--launcher", "local",
        "--name", "run", "--stop-after", "simclr", "--simclr.epochs", "0", "--simclr.batch", "60",
    ]  # fmt: skip
    assert cli.main(flags) == 2
    assert "simclr.epochs: no epoch of training, and no weights" in capsys.readouterr().err
    assert cli.main([*flags, "--model.weights", str(tmp_path / "given")]) == 0
    assert same(wanted, given.load_file(tmp_path / "run" / "backbone.safetensors"))
