"""An attack and a source of somebody else's: one class each, registered while the program runs, through the command."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.attacks import ATTACKS
from data_prep.beton import read_beton
from data_prep.cli import command, main, parse
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from data_prep.dataset.verify import verify_dataset
from data_prep.errors import UserError
from data_prep.sources import SOURCES

PACKAGE = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from data_prep.attacks import Attack, Trigger
from data_prep.errors import UserError
from data_prep.sources import OpenSource, Source, in_memory


@dataclass(frozen=True, kw_only=True)
class Stripe(Attack):
    """A bright column; each class becomes the one that mirrors it."""

    name: ClassVar[str] = "stripe"

    column: int = 2
    """Where the stripe is."""

    def __post_init__(self):
        if self.column < 0:
            raise UserError(f"column {self.column} is negative", where="column", expected="0 or more")

    @property
    def has_target(self) -> bool:
        return False

    def eligible(self, labels, target):
        return np.ones(len(labels), dtype=bool)

    def relabel(self, labels, target, num_classes):
        return num_classes - 1 - labels

    def train_trigger(self, image_px: int) -> Trigger:
        def trigger(images, index):
            out = images.copy()
            out[:, :, self.column] = 255
            return out

        return trigger


@dataclass(frozen=True, kw_only=True)
class Ramps(Source):
    """Grey ramps of four brightnesses."""

    name: ClassVar[str] = "ramps"

    side_px: int = 8
    """Side of the images."""

    def find(self) -> OpenSource:
        def split(per_class):
            labels = np.repeat(np.arange(4), per_class)
            ramp = np.broadcast_to(np.arange(self.side_px)[:, None, None], (self.side_px, self.side_px, 3))
            images = (ramp[None] + 10 * labels[:, None, None, None]).astype(np.uint8)
            return in_memory(images, labels, locate=lambda i: f"ramp {i}")

        return OpenSource(("a", "b", "c", "d"), split(10), split(3))
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch) -> Iterator[Any]:
    """The package, imported and registered."""
    folder = tmp_path / "ramps_and_stripes"
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    spec = importlib.util.spec_from_file_location("ramps_and_stripes", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ramps_and_stripes", package)
    spec.loader.exec_module(package)
    ATTACKS.add("stripe", package.Stripe)
    SOURCES.add("ramps", package.Ramps)
    yield package
    del ATTACKS._parts()["stripe"], SOURCES._parts()["ramps"]


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*argv, "--help"])
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_they_are_in_the_help_with_their_flags(plugins, capsys):
    assert "ramps" in help_of(capsys)
    shown = help_of(capsys, "ramps")
    assert "--side-px" in shown
    assert "Side of the images." in shown
    assert "stripe" in shown
    shown = help_of(capsys, "digits", "stripe")
    assert "--column" in shown
    assert "Where the stripe is." in shown
    assert "--protocol" in shown


def test_they_make_a_data_set(plugins, tmp_path, capsys):
    arguments = ["ramps", "stripe", "--column", "1", "--train-per-class", "9", "--rate", "0.25", "--seed", "4"]
    assert main([*arguments, "--datasets", str(tmp_path), "--workers", "1"]) == 0
    folder = tmp_path / "ramps-9pc-stripe-column1-r0.25-s4"
    assert f"{folder}: 36 training (9 poisoned) and 12 test images of 8 px" in capsys.readouterr().out
    manifest = open_dataset(folder).manifest
    assert manifest.attack == {"kind": "stripe", "column": 1}
    assert manifest.source["side_px"] == 8
    assert (manifest.target, manifest.label_map, manifest.poisoned) == (None, (3, 2, 1, 0), 9)
    assert manifest.attack_labels(np.array([0, 3, 1])).tolist() == [3, 0, 2]
    images, labels, _ = read_beton(folder / "train.beton")
    truth = read_truth(folder)["train"]
    assert ((images[:, :, 1] == 255).all(axis=(1, 2)) == truth.poisoned).all()
    assert (labels == np.where(truth.poisoned, 3 - truth.true_label, truth.true_label)).all()
    assert [passed.name for passed in verify_dataset(folder, progress=False)][-1] == "preview"


def test_their_errors_name_the_flag(plugins, tmp_path):
    with pytest.raises(UserError, match=r"--column: column -1 is negative"):
        main(["ramps", "stripe", "--column", "-1", "--datasets", str(tmp_path)])
    with pytest.raises(UserError, match=r"--train-per-class: 11 images a class, but class 0 \(a\) has 10"):
        main(["ramps", "--train-per-class", "11", "--datasets", str(tmp_path)])


def test_without_them_the_command_is_as_before(capsys):
    assert "stripe" not in help_of(capsys, "digits")
    assert issubclass(command(), PrepareConfig)
    assert type(parse(["digits", "badnets"])) is PrepareConfig


def test_the_old_name_of_protocol(capsys):
    for old in (["--setting", "bench"], ["--setting=bench"]):
        assert parse(["digits", "badnets", *old]).protocol == "ten-percent"
        assert capsys.readouterr().err.startswith("note: --setting is called --protocol now\nnote: --protocol bench is")
    with pytest.raises(UserError, match="both --setting and --protocol"):
        parse(["digits", "badnets", "--setting", "paper", "--protocol=paper"])


def test_the_old_name_of_a_protocol(capsys):
    for old in (["--protocol", "bench"], ["--protocol=bench"]):
        assert parse(["digits", "badnets", *old]) == parse(["digits", "badnets", "--protocol", "ten-percent"])
        assert capsys.readouterr().err == "note: --protocol bench is called ten-percent now, as it is no benchmark's\n"
