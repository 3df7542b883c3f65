"""Whole runs of the smoke preset in this process: what they leave, how they go on, share stages, and are refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from dbd_dist.cli import main
from dbd_dist.config import override
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.evaluator import Evaluator, pooled_features
from dbd_dist.fields import from_dict
from dbd_dist.launch.local import run_local
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier
from dbd_dist.runtime import checkpoint, runner
from dbd_dist.runtime.checkpoint import Checkpoints, load_state, retry_on_oserror
from dbd_dist.runtime.progress import ProgressFile
from dbd_dist.runtime.reporter import Reporter
from dbd_dist.runtime.run_folder import RunFolder
from dbd_dist.runtime.stopping import Stopped, StopRequest

TIMES = {"time_s", "images_per_s"}
RUN = "run"
EPOCHS = [("simclr", 1), ("simclr", 2), ("warmup", 1), ("warmup", 2), ("mixmatch", 1), ("mixmatch", 2)]
"""The checkpoints of a smoke run under the defence, in order."""


def train(config, storage: Path, name: str = RUN) -> dict[str, Any] | None:
    return run_local(config, storage=storage, name=name, quiet=True)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what may differ between equal runs."""
    return {k: v for k, v in result.items() if k not in ("seconds", "reused_stages")}


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES | {"reused"}} for row in lines]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def defended(smoke_config, tmp_path_factory) -> Path:
    """The storage of an uninterrupted run. Not to be changed."""
    storage = tmp_path_factory.mktemp("defended")
    train(smoke_config, storage)
    return storage


@pytest.fixture(scope="module")
def undefended(smoke_none, tmp_path_factory) -> Path:
    storage = tmp_path_factory.mktemp("undefended")
    train(smoke_none, storage)
    return storage


def result_of(storage: Path) -> dict[str, Any]:
    return json.loads((storage / RUN / "result.json").read_text())


# -- what a run leaves

DOCUMENTED = {
    "method", "dataset", "attack", "seed", "clean_acc", "asr", "robust_acc", "asr_untriggered", "per_class_acc",
    "images", "changes_input",
    "kept_poisoned", "kept",
    "poisoned", "train_size", "seconds", "world_size", "device", "commit", "versions", "preset",
}  # fmt: skip
"""Fields of result.json in docs/design.md."""


def test_result_of_a_defended_run(defended, smoke_config):
    result = result_of(defended)
    assert result.keys() >= DOCUMENTED
    assert (result["method"], result["preset"], result["attack"]) == ("dbd", "smoke", "badnets")
    assert (result["seed"], result["world_size"], result["train_size"], result["poisoned"]) == (0, 1, 240, 24)
    assert result["kept"] == 120
    for share in ("clean_acc", "asr", "robust_acc"):
        assert 0 <= result[share] <= 1
    assert len(result["per_class_acc"]) == 10
    # five test images of each class, so that the mean over classes is the accuracy
    assert np.mean(result["per_class_acc"]) == pytest.approx(result["clean_acc"])
    assert result["seconds"].keys() == {"simclr", "warmup", "mixmatch"}
    assert all(s > 0 for s in result["seconds"].values())
    assert result["reused_stages"] == []
    assert result["feature_quality"]["kind"] == "ssl"
    last_warmup = [row for row in rows(defended / RUN) if row["stage"] == "warmup"][-1]
    assert result["after_warmup"] == {name: last_warmup[name] for name in ("clean_acc", "asr", "robust_acc")}


def test_quality_of_the_split_is_that_of_its_table(defended):
    quality = result_of(defended)["split_quality"]
    table = pq.read_table(defended / RUN / "split.parquet").to_pydict()
    (manifest,) = defended.rglob("run.json")
    truth = read_truth(json.loads(manifest.read_text())["config"]["data"])["train"].poisoned
    for when, before in (("first", "first_"), ("last", "")):
        losses, kept = table[f"{before}loss"], table[f"{before}kept"]
        pairs = [
            (losses[i] > losses[j]) + 0.5 * (losses[i] == losses[j])
            for i in np.flatnonzero(truth)
            for j in np.flatnonzero(~truth)
        ]
        assert quality[when]["auroc"] == pytest.approx(np.mean(pairs))
        assert quality[when]["tpr"] == np.mean([not kept[i] for i in np.flatnonzero(truth)])


def test_result_of_an_undefended_run(undefended):
    result = result_of(undefended)
    assert result["feature_quality"]["kind"] == "supervised"
    assert not {"split_quality", "after_warmup"} & result.keys()
    assert result.keys() >= DOCUMENTED
    assert result["method"] == "none"
    assert (result["kept"], result["kept_poisoned"], result["poisoned"]) == (None, None, 24)
    assert result["seconds"].keys() == {"supervised"}
    assert not (undefended / RUN / "split.parquet").exists()
    assert str(np.load(undefended / RUN / "features.npz")["kind"]) == "supervised"
    assert [(row["stage"], row["epoch"]) for row in rows(undefended / RUN)] == [("supervised", 1), ("supervised", 2)]


def test_files_of_a_run(defended, smoke_config):
    folder = defended / RUN
    assert {p.name for p in folder.iterdir()} == {
        "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "split.parquet", "features.npz",
        "model.safetensors", "model.json", "backbone.safetensors", "backbone.json", "result.json", "logs",
    }  # fmt: skip
    assert list((folder / "tensorboard").iterdir())
    assert sorted(p.name.split("-")[0] for p in (defended / "stages").iterdir()) == ["simclr", "warmup"]
    run = json.loads((folder / "run.json").read_text())
    assert run.keys() >= {
        "config", "config_hash", "data_hash", "dataset", "versions", "commit", "host", "command", "started",
    }  # fmt: skip
    assert from_dict(type(smoke_config), run["config"]) == smoke_config


def test_rows_of_metrics(defended, smoke_config):
    found = [json.loads(line) for line in (defended / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in found] == EPOCHS
    for row in found:
        assert row.keys() >= {"stage", "epoch", "epochs", "loss", "lr", "images_per_s", "time_s"}
        assert row["epochs"] == 2
    measured = [row for row in found if "clean_acc" in row]
    assert [row["stage"] for row in measured] == ["warmup", "warmup", "mixmatch", "mixmatch"]
    assert {"asr", "kept_poisoned", "kept"} <= measured[-1].keys()
    result = result_of(defended)
    assert (measured[-1]["clean_acc"], measured[-1]["asr"]) == (result["clean_acc"], result["asr"])


def test_split_on_disk_is_the_one_that_was_counted(defended, digits):
    table = pq.read_table(defended / RUN / "split.parquet").to_pydict()
    assert table.keys() == {"index", "loss", "kept", "first_loss", "first_kept"}
    assert table["index"] == list(range(240))
    for loss, kept in (("loss", "kept"), ("first_loss", "first_kept")):
        ranked = sorted(range(240), key=lambda i: (table[loss][i], i))
        assert {i for i in range(240) if table[kept][i]} == set(ranked[:120])
    poisoned = read_truth(digits)["train"].poisoned
    assert result_of(defended)["kept_poisoned"] == int((np.array(table["kept"]) & poisoned).sum())
    assert table["first_loss"] != table["loss"]  # two epochs, two splits


def test_exported_model_gives_the_measured_accuracy(defended, digits, smoke_config):
    description = json.loads((defended / RUN / "model.json").read_text())
    model = Classifier(from_dict(ModelConfig, description["network"]), len(description["class_names"]))
    model.load_state_dict(load_file(str(defended / RUN / "model.safetensors")))
    measured = Evaluator(open_dataset(digits), World(), smoke_config.normalise, bf16=False).measure(model)
    result = result_of(defended)
    assert (measured.clean_acc, measured.asr) == (result["clean_acc"], result["asr"])


def test_features_are_those_of_the_pretrained_backbone(defended, smoke_config, digits):
    found = np.load(defended / RUN / "features.npz")
    assert str(found["kind"]) == "ssl"
    assert found["index"].tolist() == list(range(240))  # fewer than 2,000: all of them
    assert found["features"].shape == (240, smoke_config.model.feature_dim)
    model = Classifier(smoke_config.model, 10)
    state = load_state(next((defended / "stages").glob("simclr-*")) / "state.pt", needs=("backbone",))
    model.backbone.load_state_dict(state["backbone"])
    images = ResidentImages.read(open_dataset(digits), torch.device("cpu"))
    pixels = next(images.batches([torch.arange(240)]))
    expected = pooled_features(model.backbone, pixels, smoke_config.normalise).numpy()
    np.testing.assert_allclose(found["features"], expected, rtol=2e-3, atol=2e-3)


# -- going on


class Crash(Exception):
    """Stands for a kill: nothing of ours may catch it."""


class CrashAfter(Checkpoints):
    """Dies right after the k-th state is written."""

    saves_left = 0

    def save(self, state) -> None:
        super().save(state)
        CrashAfter.saves_left -= 1
        if CrashAfter.saves_left == 0:
            self.flush()
            raise Crash


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3, 5, 6], ids=lambda k: "{}-{}".format(*EPOCHS[k - 1]))
def test_crash_and_resume_equal_an_uninterrupted_run(k, defended, smoke_config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", k)
        with pytest.raises(Crash):
            train(smoke_config, tmp_path)
    assert [(row["stage"], row["epoch"]) for row in rows(tmp_path / RUN)] == EPOCHS[:k]
    assert not (tmp_path / RUN / "result.json").exists()
    # where the next epoch was under way, its row may be there although its checkpoint is not
    with open(tmp_path / RUN / "metrics.jsonl", "a") as file:
        stage, epoch = EPOCHS[min(k, len(EPOCHS) - 1)]
        if k < len(EPOCHS):
            file.write(json.dumps({"stage": stage, "epoch": epoch, "epochs": 2, "loss": -1.0, "time_s": 1}) + "\n")
        file.write('{"stage": "mixma')  # the torn line of a killed writer

    trained = record_epochs(monkeypatch)
    result = train(smoke_config, tmp_path)
    assert trained == EPOCHS[k:]
    assert numbers(result) == numbers(result_of(defended))
    assert rows(tmp_path / RUN) == rows(defended / RUN)
    for name in ("model.safetensors", "split.parquet"):
        assert (tmp_path / RUN / name).read_bytes() == (defended / RUN / name).read_bytes()


@pytest.mark.slow
def test_crash_and_resume_without_defence(undefended, smoke_none, tmp_path, monkeypatch):
    config = smoke_none
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", 1)
        with pytest.raises(Crash):
            train(config, tmp_path)
    assert numbers(train(config, tmp_path)) == numbers(result_of(undefended))
    assert rows(tmp_path / RUN) == rows(undefended / RUN)
    weights = [(s / RUN / "model.safetensors").read_bytes() for s in (tmp_path, undefended)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_another_seed_gives_other_numbers(defended, smoke_config, tmp_path):
    """The control of the tests above: their comparison can fail."""
    train(replace(smoke_config, seed=1), tmp_path)
    assert rows(tmp_path / RUN) != rows(defended / RUN)


@pytest.mark.parametrize("k", [4, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 7, 11))])
def test_crash_inside_an_epoch_loses_no_step_after_the_last_state(k, defended, smoke_config, tmp_path, monkeypatch):
    config = replace(smoke_config, compute=replace(smoke_config.compute, checkpoint_steps=1))
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", k)
        with pytest.raises(Crash):
            train(config, tmp_path)
    newest = Checkpoints(tmp_path / RUN / "checkpoints", is_main=True).newest()
    assert newest is not None
    steps: list[tuple[str, int, int]] = []
    tick = ProgressFile.tick

    def note(self, stage, epoch, epochs, step, total) -> None:
        steps.append((stage, epoch, step))
        tick(self, stage, epoch, epochs, step, total)

    monkeypatch.setattr(ProgressFile, "tick", note)
    result = train(smoke_config, tmp_path)  # how often states are saved is no part of the method
    state = newest[1]["state"]
    epoch, step = (state["epoch"] + 1, state["step"] + 1) if "step" in state else (state["epoch"] + 1, 1)
    assert steps[0] == (newest[1]["stage"], epoch, step) or state["epoch"] == 2  # else with the next stage
    assert len(steps) == len(set(steps))
    assert numbers(result) == numbers(result_of(defended))
    assert rows(tmp_path / RUN) == rows(defended / RUN)
    for name in ("model.safetensors", "split.parquet"):
        assert (tmp_path / RUN / name).read_bytes() == (defended / RUN / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "after",
    [
        ("mixmatch", 1, 1),
        *(pytest.param(k, marks=pytest.mark.slow) for k in (("simclr", 1, 2), ("warmup", 2, 1), ("mixmatch", 2, 4))),
    ],
)
def test_a_signal_leaves_a_state_and_the_run_goes_on_from_it(
    number, code, after, defended, smoke_config, tmp_path, monkeypatch, capfd
):
    ticks: list[tuple[str, int, int]] = []
    tick = ProgressFile.tick

    def kill(self, stage, epoch, epochs, step, steps) -> None:
        tick(self, stage, epoch, epochs, step, steps)
        ticks.append((stage, epoch, step))
        if ticks[-1] == after:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressFile, "tick", kill)
    monkeypatch.setattr(
        "dbd_dist.runtime.stopping.StopPoller.EVERY_S", 0.0
    )  # steps take milliseconds here: ask after each
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"stopped after {after[0]}, epoch {after[1]}") as caught:
        train(smoke_config, tmp_path)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err
    assert {p.name for p in (tmp_path / RUN).iterdir()} <= {
        "run.json", "metrics.jsonl", "tensorboard", "checkpoints", "backbone.safetensors", "backbone.json", "logs",
    }  # fmt: skip
    assert numbers(train(smoke_config, tmp_path)) == numbers(result_of(defended))
    assert len(ticks) == len(set(ticks))  # no step twice
    assert ticks[-1] == ("mixmatch", 2, 4)  # the last of all
    assert rows(tmp_path / RUN) == rows(defended / RUN)
    assert (tmp_path / RUN / "model.safetensors").read_bytes() == (defended / RUN / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_second_signal_stops_at_once(smoke_config, tmp_path, monkeypatch):
    def kill(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ProgressFile, "tick", kill)
    with pytest.raises(KeyboardInterrupt):
        train(smoke_config, tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / RUN / "checkpoints").exists()
    assert train(smoke_config, tmp_path) is not None


def test_a_notice_gets_one_checkpoint_and_the_run_goes_on(defended, smoke_config, tmp_path, monkeypatch):
    """As Ray Train gives it when a node is about to be taken away: it stays until the node goes."""
    positions: list[tuple[str, int, int]] = []
    save = Checkpoints.save

    def note(self, state) -> None:
        positions.append((state["stage"], state["state"]["epoch"], state["state"].get("step", 0)))
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", note)
    monkeypatch.setattr("dbd_dist.runtime.stopping.StopPoller.EVERY_S", 0.0)
    folder = RunFolder(tmp_path / RUN)
    asked = 0

    def notice() -> str | None:
        nonlocal asked
        asked += 1
        return "state" if asked >= 3 else None  # from the third step on

    dataset, stages = open_dataset(smoke_config.data), tmp_path / "stages"
    folder.claim(smoke_config, dataset)
    request = StopRequest(folder.stop, notice=notice)
    result = runner.run(smoke_config, dataset, folder, stages, World(), request=request)
    assert [at for at in positions if at[2]] == [("simclr", 0, 3)]
    assert [at[:2] for at in positions if not at[2]] == EPOCHS
    assert result is not None
    assert numbers(result) == numbers(result_of(defended))
    assert rows(tmp_path / RUN) == rows(defended / RUN)


def test_a_mirror_that_cannot_be_written_is_refused_before_anything_is_trained(smoke_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    far = (tmp_path / "file" / "below").as_uri()
    trained = record_epochs(monkeypatch)
    with pytest.raises(UserError, match=r"compute\.mirror: .* cannot be written"):
        train(replace(smoke_config, compute=replace(smoke_config.compute, mirror=far)), tmp_path / "runs")
    assert trained == []


@pytest.mark.slow
def test_event_files_hold_no_epoch_twice(defended, smoke_config, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", 3)
        with pytest.raises(Crash):
            train(smoke_config, tmp_path)
    train(smoke_config, tmp_path)
    events = EventAccumulator(str(tmp_path / RUN / "tensorboard"))
    events.Reload()
    for stage in ("simclr", "warmup", "mixmatch"):
        assert [event.step for event in events.Scalars(f"{stage}/loss")] == [1, 2]
    result = result_of(tmp_path)
    for name, value in (
        ("clean_acc", result["clean_acc"]), ("split_quality/first/auroc", result["split_quality"]["first"]["auroc"]),
        ("feature_quality/knn_acc", result["feature_quality"]["knn_acc"]),
        ("after_warmup/asr", result["after_warmup"]["asr"]),
    ):  # fmt: skip
        (event,) = events.Scalars(f"result/{name}")
        assert event.value == pytest.approx(value)
    assert result["images"]["simclr"] % 2 == 0


@pytest.mark.slow
def test_storage_that_is_gone_for_a_while_changes_nothing(defended, smoke_config, tmp_path, monkeypatch):
    """Whatever is renamed into place fails at first, every time that it is new."""
    calls, rename = Counter(), os.replace

    def flaky(source, target) -> None:
        calls[str(target)] += 1
        if calls[str(target)] % 2:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        rename(source, target)

    folder = tmp_path / RUN
    config = replace(smoke_config, compute=replace(smoke_config.compute, patience_s=30.0))
    monkeypatch.setattr(checkpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(os, "replace", flaky)
    folder.mkdir()
    claim = RunFolder.claim
    monkeypatch.setattr(
        RunFolder, "claim", lambda self, *args: retry_on_oserror(lambda: claim(self, *args), folder, 30.0)
    )
    assert numbers(train(config, tmp_path)) == numbers(result_of(defended))
    failed = {Path(target).name for target in calls}
    assert failed >= {"metrics.jsonl", "state.pt", "checkpoint_000005.pt", "model.safetensors", "model.json",
                      "split.parquet", "features.npz", "backbone.json", "result.json"}  # fmt: skip
    assert rows(folder) == rows(defended / RUN)
    assert {p.name for p in folder.iterdir()} == {p.name for p in (defended / RUN).iterdir()}


def test_no_memory_is_one_message(smoke_config, tmp_path, monkeypatch):
    def too_large(*_, **__):
        torch.empty(2**60)

    monkeypatch.setattr("dbd_dist.stages.mixmatch.mixmatch_losses", too_large)
    with pytest.raises(UserError, match=r"after warmup, epoch 2: out of memory .*--simclr\.chunk"):
        train(smoke_config, tmp_path)


def crash(config, storage: Path, k: int, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", k)
        with pytest.raises(Crash):
            train(config, storage)


@pytest.mark.slow
def test_a_stage_that_another_run_finished_brings_all_its_rows(defended, smoke_config, tmp_path, monkeypatch):
    crash(smoke_config, tmp_path, 1, monkeypatch)
    train(override(smoke_config, {"split.keep": 0.4}), tmp_path, "another")
    trained = record_epochs(monkeypatch)
    result = train(smoke_config, tmp_path)
    assert trained == EPOCHS[4:]
    assert result["reused_stages"] == ["simclr", "warmup"]
    assert numbers(result) == numbers(result_of(defended))
    assert rows(tmp_path / RUN) == rows(defended / RUN)


@pytest.mark.slow
def test_a_stage_whose_file_was_lost_is_there_once_and_spares_later_checkpoints(
    defended, smoke_config, tmp_path, monkeypatch
):
    crash(smoke_config, tmp_path, 5, monkeypatch)
    shutil.rmtree(tmp_path / "stages")
    crash(smoke_config, tmp_path, 1, monkeypatch)  # at the first state that is saved: none of simclr or warmup
    trained = record_epochs(monkeypatch)
    assert numbers(train(smoke_config, tmp_path)) == numbers(result_of(defended))
    assert trained == []
    key = lambda row: EPOCHS.index((row["stage"], row["epoch"]))  # noqa: E731
    assert sorted(rows(tmp_path / RUN), key=key) == rows(defended / RUN)


@pytest.mark.slow
def test_a_state_of_another_precision_is_refused_and_stays(defended, smoke_config, tmp_path, monkeypatch):
    """`auto` may be another on other hardware."""
    crash(smoke_config, tmp_path, 1, monkeypatch)
    before = content(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "uses_bf16", lambda config, device: True)
        with pytest.raises(UserError, match="in another precision"):
            train(smoke_config, tmp_path)
    left = {name: data for name, data in content(tmp_path).items() if "logs/" not in name}
    assert left == {name: data for name, data in before.items() if "logs/" not in name}
    assert numbers(train(smoke_config, tmp_path)) == numbers(result_of(defended))


def test_a_checkpoint_of_another_seed_is_called_so(smoke_config, tmp_path, monkeypatch):
    crash(replace(smoke_config, seed=1), tmp_path / "other", 1, monkeypatch)
    shutil.copytree(tmp_path / "other" / RUN / "checkpoints", tmp_path / RUN / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoint_000000.pt is of another run \(other data, another seed") as caught:
        train(smoke_config, tmp_path)
    assert "precision" not in str(caught.value)


@pytest.mark.parametrize("part", ["model", "optimizer", "split"])
def test_a_checkpoint_that_does_not_fit_its_stage_is_one_message(part, defended, smoke_config, tmp_path):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    (storage / RUN / "result.json").unlink()
    newest = storage / RUN / "checkpoints" / "checkpoint_000005.pt"
    state = load_state(newest, needs=checkpoint.CHECKPOINT_KEYS)
    for found in ({}, {"x": torch.zeros(2)}, [1], None):
        checkpoint.save_state(state | {"state": state["state"] | {part: found}}, newest)
        with pytest.raises(UserError, match="does not fit its stage"):
            train(smoke_config, storage)


@pytest.mark.slow
def test_hidden_files_of_others_stay(smoke_config, tmp_path):
    folder = tmp_path / RUN
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref")
    (folder / ".gitignore").write_text("*")
    (folder / ".metrics.jsonl").write_text("of a killed process")
    train(smoke_config, tmp_path)
    assert {p.name for p in folder.glob(".*")} == {".git", ".gitignore"}
    assert (folder / ".git" / "HEAD").read_text() == "ref"


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
def test_a_mirror_out_of_reach_matters_only_to_a_run_that_needs_it(damaged, smoke_config, tmp_path, monkeypatch):
    far = tmp_path / "far"
    config = replace(smoke_config, compute=replace(smoke_config.compute, mirror=far.as_uri()))
    crash(config, tmp_path / "runs", 2, monkeypatch)
    if damaged:
        for path in (tmp_path / "runs" / RUN / "checkpoints").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        trained = record_epochs(monkeypatch)
        train(config, tmp_path / "runs")
        assert trained == EPOCHS[2:]  # from the mirror's copies
        return
    shutil.rmtree(far)
    far.write_text("in the way")
    assert train(config, tmp_path / "runs") is not None


def test_a_mirror_brings_a_lost_run_back(defended, smoke_config, tmp_path, monkeypatch):
    config = replace(smoke_config, compute=replace(smoke_config.compute, mirror=(tmp_path / "far").as_uri()))
    with monkeypatch.context() as patch:
        patch.setattr("dbd_dist.runtime.runner.Checkpoints", CrashAfter)
        patch.setattr(CrashAfter, "saves_left", 5)
        with pytest.raises(Crash):
            train(config, tmp_path / "lost")
    shutil.rmtree(tmp_path / "lost")
    trained = record_epochs(monkeypatch)
    assert numbers(train(config, tmp_path / "new")) == numbers(result_of(defended))
    assert trained == EPOCHS[5:]
    assert rows(tmp_path / "new" / RUN) == rows(defended / RUN)


def record_epochs(monkeypatch) -> list[tuple[str, int]]:
    """The epochs that are trained from here on."""
    trained: list[tuple[str, int]] = []
    report = Reporter.report

    def note(self, end) -> None:
        trained.append((end.stage, end.epoch))
        report(self, end)

    monkeypatch.setattr(Reporter, "report", note)
    return trained


def test_finished_run_is_left_alone(defended, smoke_config, monkeypatch):
    trained = record_epochs(monkeypatch)
    before = content(defended)
    assert train(smoke_config, defended) == result_of(defended)
    assert trained == []
    assert content(defended) == before


def test_the_doctor_looks_into_checkpoints(defended, tmp_path, capsys):
    folder = Path(shutil.copytree(defended / RUN, tmp_path / RUN))
    assert main(["doctor", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint_000005.pt: mixmatch, epoch 2" in out
    path = folder / "checkpoints" / "checkpoint_000004.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["doctor", str(folder)]) == 2
    assert "checkpoint_000004.pt: damaged" in capsys.readouterr().err


# -- stages shared between runs


@pytest.mark.slow
def test_another_filter_reuses_pretraining_and_warmup(defended, smoke_config, tmp_path, monkeypatch):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    trained = record_epochs(monkeypatch)
    config = override(smoke_config, {"split.keep": 0.25})
    result = train(config, storage, "other")
    assert trained == [("mixmatch", 1), ("mixmatch", 2)]
    assert result is not None
    assert result["reused_stages"] == ["simclr", "warmup"]
    assert result["kept"] == 60
    assert result["config_hash"] != result_of(defended)["config_hash"]
    assert rows(storage / "other")[:4] == rows(defended / RUN)[:4]  # the rows come with the stages
    assert len(list((storage / "stages").iterdir())) == 2

    monkeypatch.undo()
    alone = train(config, tmp_path / "fresh")  # sharing changes nothing in the numbers
    assert alone is not None
    assert alone["reused_stages"] == []
    assert numbers(alone) == numbers(result)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"warmup.sce_alpha": 0.2}, [("warmup", 1), ("warmup", 2)]),
        ({"simclr.temperature": 0.4}, EPOCHS[:4]),
    ],
)
def test_a_stage_is_not_reused_where_it_depends_on_the_change(
    change, again, defended, smoke_config, tmp_path, monkeypatch
):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    trained = record_epochs(monkeypatch)
    config = override(smoke_config, {"stop_after": "warmup", **change})
    assert train(config, storage, "other") is None
    assert trained == again


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["simclr", "warmup"])
def test_stop_after_keeps_the_stage_and_gives_no_result(stage, defended, smoke_config, tmp_path, monkeypatch):
    trained = record_epochs(monkeypatch)
    config = replace(smoke_config, stop_after=stage)
    assert train(config, tmp_path, "short") is None
    last = {"simclr": 2, "warmup": 4}[stage]
    assert trained == EPOCHS[:last]
    assert not (tmp_path / "short" / "result.json").exists()
    assert not (tmp_path / "short" / "progress.json").exists()
    assert train(config, tmp_path, "short") is None  # again, and nothing is left to do
    assert trained == EPOCHS[:last]
    result = train(smoke_config, tmp_path)
    assert trained == EPOCHS
    assert numbers(result) == numbers(result_of(defended))


def test_stages_of_another_number_of_classes_are_not_reused(defended, smoke_config, digits_copy, edit_sealed, tmp_path):
    """Equal images and labels, and an eleventh class of which there is no image."""
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    names = [*open_dataset(digits_copy).manifest.class_names, "none"]
    edit_sealed(digits_copy / "manifest.json", class_names=names, num_classes=11, label_map=[3] * 11)
    result = train(replace(smoke_config, data=digits_copy), storage, "wider")
    assert result is not None
    assert result["reused_stages"] == ["simclr"]  # a backbone has no head
    assert len(result["per_class_acc"]) == 11


# -- what is refused


def test_another_configuration_in_the_same_folder_is_refused(defended, smoke_config, tmp_path):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    before = content(storage)
    with pytest.raises(UserError, match="another configuration"):
        train(replace(smoke_config, seed=7), storage)
    assert content(storage) == before


def test_a_run_whose_configuration_is_lost_is_another_ones(defended, smoke_config, tmp_path, edit_json):
    """Its hash is there and another's; what it was computed from is not."""
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    path = storage / RUN / "run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "config"}))
    with pytest.raises(UserError, match="another configuration"):
        train(replace(smoke_config, seed=7), storage)


def test_other_data_in_the_same_folder_is_refused(defended, smoke_config, digits, tmp_path, edit_json):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    edit_json(storage / RUN / "run.json", data_hash="0" * 64)
    with pytest.raises(UserError, match="made on data 000000000000, not"):
        train(smoke_config, storage)


def test_moved_data_and_more_threads_are_the_same_run(defended, smoke_config, digits_copy, tmp_path):
    storage = Path(shutil.copytree(defended, tmp_path / "storage"))
    moved = replace(smoke_config, data=digits_copy, compute=replace(smoke_config.compute, resident_gib=1.0))
    assert train(moved, storage) == result_of(defended)


@pytest.mark.parametrize(
    ("field", "change", "workers", "expected"),
    [
        ("simclr.batch", {"simclr.batch": 241}, 1, "at most 240"),
        ("warmup.batch", {"warmup.batch": 512}, 1, "at most 240"),
        ("mixmatch.batch", {"mixmatch.batch": 122}, 2, "at most 120"),
        ("mixmatch.batch", {"split.keep": 0.95}, 1, "at most 12"),
        ("simclr.batch", {"simclr.batch": 61}, 2, "a multiple of 2, at least 4"),
        ("mixmatch.batch", {"mixmatch.batch": 8}, 8, "a multiple of 8, at least 16"),
    ],
)
def test_batches_that_do_not_fit(field, change, workers, expected, smoke_config, digits):
    # batches that every number of workers here shares, so that the one in question is the only fault
    config = override(smoke_config, {"simclr.batch": 80, "warmup.batch": 80, **change})
    with pytest.raises(UserError) as caught:
        runner.check(config, open_dataset(digits), workers)
    assert str(caught.value.where) == field
    assert caught.value.expected == expected


def test_what_does_not_run_need_not_fit(smoke_config, digits):
    config = override(smoke_config, {"stop_after": "simclr", "warmup.batch": 241, "mixmatch.batch": 122})
    runner.check(config, open_dataset(digits), 1)
    with pytest.raises(UserError, match=r"warmup\.batch"):
        runner.check(replace(config, stop_after="warmup"), open_dataset(digits), 1)


def test_a_batch_larger_than_the_data_set_without_defence(smoke_none, digits):
    with pytest.raises(UserError, match=r"supervised\.batch"):
        runner.check(override(smoke_none, {"supervised.batch": 10_000}), open_dataset(digits), 1)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before(smoke_config, tmp_path):
    config = override(smoke_config, {"mixmatch.lr": 1e30})
    with pytest.raises(
        UserError, match=r"mixmatch, epoch 1, step \d+ of \d+: the loss is not a finite number"
    ) as caught:
        train(config, tmp_path)
    assert f"kept in {tmp_path / RUN / 'checkpoints'} (warmup, epoch 2)" in str(caught.value)
    newest = Checkpoints(tmp_path / RUN / "checkpoints", is_main=True).newest()
    assert newest is not None
    assert (newest[1]["stage"], newest[1]["state"]["epoch"]) == ("warmup", 2)
    assert not (tmp_path / RUN / "result.json").exists()


@pytest.mark.slow
def test_a_staged_data_set_changes_nothing(defended, smoke_config, digits, tmp_path):
    config = replace(smoke_config, compute=replace(smoke_config.compute, stage=tmp_path / "node"))
    result = train(config, tmp_path / "runs")
    assert result is not None
    assert numbers(result) == numbers(result_of(defended))
    (copy,) = (p for p in (tmp_path / "node").iterdir() if p.is_dir())
    assert content(copy) == content(digits)


def test_a_relative_place_for_copies_is_refused(smoke_config):
    with pytest.raises(UserError, match=r"compute\.stage: 'node' is relative.*an absolute path"):
        replace(smoke_config.compute, stage=Path("node"))
