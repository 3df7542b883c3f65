"""Crafted attacks that the project does not know: from `dbd craft` to `dbd doctor`, and what is wrong with some."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import toy_crafts

from data_prep.artefacts import read_artefact
from data_prep.attacks import ATTACKS, BadNets
from data_prep.beton import read_beton
from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.craft import CRAFTS
from dbd_dist.models.exported import read_exported
from dbd_dist.models.heads import Classifier, seeded
from dbd_dist.runtime.run_folder import RunFolder

DIGITS = ("digits", "--train-per-class", "30", "--test-per-class", "2")


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Registries that forget what a test adds."""
    for registry in (CRAFTS, ATTACKS):
        monkeypatch.setattr(registry, "_all", dict(registry))
        monkeypatch.setattr(registry, "refused", {})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a clean data set, and a run with a classifier that learnt nothing."""
    place = tmp_path_factory.mktemp("made")
    assert main(["prepare", *DIGITS, "clean", "--out", str(place / "clean"), "--workers", "1"]) == 0
    config = TrainConfig(model=tiny.MODEL)
    classifier = seeded(lambda: Classifier(tiny.MODEL, 10), seeds.generator(1, "classifier"))
    (place / "run").mkdir()
    RunFolder(place / "run").write_model(
        classifier.state_dict(), config, open_dataset(place / "clean"), config.normalise
    )
    return place


def craft(made: Path, name: str, out: Path, *more: str) -> int:
    which = ("--data", made / "clean", "--surrogate", made / "run", "--out", out, "--batch", 10)
    return main(["craft", name, *map(str, which), "--launcher", "local", "--device", "cpu", *more])


@pytest.mark.parametrize("name", ["one-step", "universal"])
def test_from_craft_to_doctor(name, made, tmp_path, monkeypatch, capsys):
    for toy in (toy_crafts.OneStep, toy_crafts.Universal):
        CRAFTS.add(toy.name, toy)
    more = ("--eps", "20", "--rate", "0.05") if name == "one-step" else ("--steps", "30", "--lr", "0.5")
    assert craft(made, name, tmp_path / "art", *more) == 0
    assert "before" in capsys.readouterr().out
    argv = ["prepare", *DIGITS, name, "--artefact", str(tmp_path / "art"), "--rate", "0.05", "--workers", "1"]
    assert main([*argv, "--out", str(tmp_path / "data")]) == 0
    clean, labels, _ = read_beton(open_dataset(made / "clean").train)
    poisoned, given, _ = read_beton(open_dataset(tmp_path / "data").train)
    chosen = read_truth(tmp_path / "data")["train"].poisoned
    assert chosen.sum() == 15
    assert (poisoned[~chosen] == clean[~chosen]).all()
    assert (given[chosen] == 3).all()
    artefact = read_artefact(tmp_path / "art", name)
    if name == "one-step":
        assert (labels[chosen] == 3).all()
        assert artefact.arrays["index"].tolist() == np.flatnonzero(chosen).tolist()
        assert (poisoned[chosen][:, 0] == 255).all()
        moved = np.abs(poisoned[chosen][:, 1:].astype(int) - clean[chosen][:, 1:])
        assert moved.max() == 20
        assert artefact.evidence["mean_linf"] == 20
    else:
        exported = read_exported(made / "run" / "model.safetensors")
        model, losses = exported.build(torch.device("cpu")), []
        for images in (clean, poisoned):
            inputs = exported.inputs(torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).float())
            losses.append(torch.nn.functional.cross_entropy(model(inputs), torch.full((15,), 3)))
        assert losses[1] < losses[0]
        assert artefact.evidence["after"]["objective"] < artefact.evidence["before"]["objective"]

    for registry in (CRAFTS, ATTACKS):  # as on a machine where the package is not installed
        monkeypatch.setattr(registry, "_all", {k: v for k, v in registry.items() if k != name})
    assert open_dataset(tmp_path / "data").manifest.attack["kind"] == name
    assert main(["doctor", str(tmp_path / "data"), str(tmp_path / "art")]) == 0
    assert f"{name}, target 3" in capsys.readouterr().out
    assert f"error: dbd craft: there is no craft '{name}'" in refused(capsys, lambda: craft(made, name, tmp_path / "x"))


def refused(capsys, command: Any, code: int = 2) -> str:
    assert command() == code
    return capsys.readouterr().err.splitlines()[-1]


def test_an_artefact_of_another_attack(made, tmp_path, capsys):
    CRAFTS.add("one-step", toy_crafts.OneStep)
    assert craft(made, "one-step", tmp_path / "art") == 0
    message = refused(capsys, lambda: main(["prepare", *DIGITS, "adaptive", "--artefact", str(tmp_path / "art")]))
    assert "an artefact for one-step" in message
    assert "one for adaptive" in message


def test_a_craft_that_lacks_something():
    class NoNetwork(toy_crafts.OneStep.__mro__[1]):
        attack = toy_crafts.OneStepAttack

    with pytest.raises(UserError, match=r"toys: entry point: the craft has no network, perturb.*attack, name, network"):
        CRAFTS.add("one-step", NoNetwork, origin="toys: entry point")
    with pytest.raises(UserError, match="the craft 'two-step' has the name 'one-step'"):
        CRAFTS.add("two-step", toy_crafts.OneStep)
    with pytest.raises(UserError, match="'adaptive' is there already"):
        CRAFTS.add("adaptive", toy_crafts.OneStep)
    with pytest.raises(UserError, match=r"is no craft.*dbd_dist\.craft\.craft\.Craft"):
        CRAFTS.add("badnets", BadNets)  # type: ignore[arg-type]


def test_plugins_that_do_not_import_leave_the_others_alone(made, tmp_path, capsys, monkeypatch):
    entries = [
        metadata.EntryPoint("broken", "no.such.module:Attack", CRAFTS.group),
        metadata.EntryPoint("one-step", "toy_crafts:OneStep", CRAFTS.group),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == CRAFTS.group else [])
    monkeypatch.setattr(CRAFTS, "_all", None)
    assert craft(made, "one-step", tmp_path / "art") == 0
    assert "note: left out a package: entry point broken = no.such.module:Attack" in capsys.readouterr().err
    assert "does not import" in refused(capsys, lambda: craft(made, "broken", tmp_path / "x"))


def test_a_craft_that_is_called_like_an_attack(capsys):
    class Taken(toy_crafts.OneStepAttack):
        name = "badnets"

    class TakesBadNets(toy_crafts.OneStep):
        attack = Taken

    CRAFTS.add("badnets", TakesBadNets)
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["prepare", "digits", "--help"])
        out, err = capsys.readouterr()
        assert "the attack 'badnets' is there already" in err
        assert "adaptive" in out


def test_a_craft_that_fails(made, tmp_path, capsys):
    class Fails(toy_crafts.OneStep):
        def perturb(self, *arguments):
            raise ZeroDivisionError("by nothing")

    CRAFTS.add("one-step", Fails)
    message = refused(capsys, lambda: craft(made, "one-step", tmp_path / "art"), code=1)
    assert f"one-step, a craft of {__name__}, failed (ZeroDivisionError: by nothing)" in message
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize(("images", "says"), [(np.zeros((36, 16, 16, 3)), "float64"), (None, "no array 'images'")])
def test_a_craft_that_gives_other_arrays(images, says, made, tmp_path, capsys):
    class Floats(toy_crafts.OneStep):
        def collect(self, data, folder):
            arrays, evidence = super().collect(data, folder)
            return {"index": arrays["index"]} | ({} if images is None else {"images": images}), evidence

    CRAFTS.add("one-step", Floats)
    message = refused(capsys, lambda: craft(made, "one-step", tmp_path / "art"))
    assert "the arrays of one-step" in message
    assert says in message
    assert not (tmp_path / "art").exists()


@dataclass(frozen=True, kw_only=True)
class Diverges(toy_crafts.OneStep):
    """Its gradient is never finite."""

    def perturb(self, network, images_BCHW, index_B, tick):
        return images_BCHW, torch.tensor(4)


def test_a_loss_that_is_not_finite_is_one_message(made, tmp_path, capsys):
    CRAFTS.add("one-step", Diverges)
    message = refused(capsys, lambda: craft(made, "one-step", tmp_path / "art"))
    assert "one-step, step 4" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_torch_is_not_imported_for_the_attacks_of_data_prep():
    code = "import sys; from dbd_dist.cli import main\ntry: main(['prepare', 'digits', 'badnets', '--help'])\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
