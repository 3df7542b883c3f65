"""Tables: the built-in ones, files of the user's own, and what is refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.artefacts import write_artefact
from data_prep.errors import UserError
from dbd_dist.cli import main
from dbd_dist.config import TrainConfig
from dbd_dist.methods import METHODS
from dbd_dist.presets import preset
from dbd_dist.reproduce.cases import find_case
from dbd_dist.reproduce.grid import Place, plan
from dbd_dist.reproduce.table import BUILT_IN, find_table, narrowed


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, **fields: object) -> Path:
    path.write_text(json.dumps({"attacks": ["badnets"], "methods": ["none", "dbd"], "preset": "smoke"} | fields))
    return path


def message(*argv: str | Path, capsys) -> str:
    """What a refused command says; it wrote nothing but the table file that was there."""
    before = sorted(Path().rglob("*"))
    assert main(["reproduce", *map(str, argv)]) == 2
    assert sorted(Path().rglob("*")) == before
    text = capsys.readouterr().err
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, text
    return errors[0]


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_built_in_tables_hold_what_is_installed(name, capsys):
    table = find_table(name)
    _, cases, wanted = BUILT_IN[name]
    assert [case.name for case in table.cases] == list(cases)
    methods = [entry if isinstance(entry, str) else entry["method"] for entry in wanted]
    assert [variant.method for variant in table.variants] == [method for method in methods if method in METHODS]
    missing = [method for method in methods if method not in METHODS]
    assert all(method in capsys.readouterr().err for method in missing[:1])


def test_a_method_that_is_not_installed_is_left_out_with_a_note(monkeypatch, capsys):
    monkeypatch.setitem(BUILT_IN, "main", ("t", ("badnets",), ("none", "no-such-method", "dbd")))  # type: ignore[arg-type]
    assert [variant.name for variant in find_table("main").variants] == ["none", "dbd"]
    assert "main leaves out no-such-method" in capsys.readouterr().err


@pytest.mark.slow
def test_each_quirk_is_a_change_that_its_flags_make(tmp_path):
    """A row has other settings than every other row of its method, and `all` those of all that a single worker has."""
    table = narrowed(find_table("quirks"), attacks=["badnets"], seeds=[0])
    whole = plan(table, Place(storage=tmp_path))
    configs = {cell.variant.name: cell.config for cell in whole.cells}
    methods = [config.method for config in configs.values()]
    assert all(method not in methods[:i] for i, method in enumerate(methods))
    released, every = stages(preset("cifar10_badnets_released").config()), stages(configs["all"])
    for stage, name in (
        ("simclr", "symmetric"), ("simclr", "schedule_epochs"), ("warmup", "freeze_batch_norm"),
        ("mixmatch", "lr_schedule"), ("mixmatch", "continue_optimizer"),
    ):  # fmt: skip
        assert getattr(every[stage], name) == getattr(released[stage], name)
    ours, theirs = every["simclr"].augment, released["simclr"].augment
    assert (ours.blur_kernel, ours.blur_p) == (theirs.blur_kernel, theirs.blur_p)
    released = stages(preset("cifar10_badnets_released").config("none"))
    assert stages(configs["black-padding"])["supervised"].augment.padding == released["supervised"].augment.padding
    plain, halved = (stages(configs[name])["simclr"] for name in ("dbd", "gradient-of-two-workers"))
    assert (plain.optimizer, halved.lr, halved.weight_decay) == ("sgd", plain.lr / 2, 2 * plain.weight_decay)


def stages(config: TrainConfig) -> dict[str, Any]:
    return {stage.name: stage for stage in config.method.stages()}


def test_the_coin_is_the_released_protocol():
    (case,) = [case for case in find_table("quirks").cases if case.name == "badnets-coin"]
    assert case.flags == ("--protocol", preset("cifar10_badnets_released").prepare.protocol)


def test_settings_follow_the_images():
    assert find_case("wanet", "digits", where="").flags == ("--grid", "2", "--strength", "4")
    assert find_case("wanet", "cifar10", where="").flags == ()
    assert find_case("label-consistent", "digits", where="").craft == ("--eps", "32", "--step", "3.2")


def test_a_rate_in_a_name_reaches_prepare_and_crafts_of_chosen_images():
    case = find_case("badnets-r0.01", "digits", where="")
    assert (case.flags, case.craft, case.title) == (("--rate", "0.01"), (), "BadNets, 1 %")
    case = find_case("label-consistent-r0.01", "cifar10", where="")
    assert (case.flags, case.craft) == (("--rate", "0.01"), ("--rate", "0.01"))
    with pytest.raises(UserError, match="no attack 'clean-r0"):
        find_case("clean-r0.1", "digits", where="")


def test_toml_and_json_give_the_same_table(place):
    variant = {"name": "dbd-0.3", "method": "dbd", "flags": ["--split.keep", "0.3"]}
    attack = {"name": "weak", "attack": "wanet", "flags": ["--strength", "1"], "title": "weak WaNet"}
    write(
        place / "mine.json",
        attacks=["badnets", attack],
        methods=["none", variant],
        seeds=[4, 2],
        title="Mine",
        detects=True,
    )
    (place / "mine.toml").write_text(
        'title = "Mine"\npreset = "smoke"\nseeds = [4, 2]\ndetects = true\n'
        'attacks = ["badnets", {name = "weak", attack = "wanet", flags = ["--strength", "1"], title = "weak WaNet"}]\n'
        'methods = ["none", {name = "dbd-0.3", method = "dbd", flags = ["--split.keep", "0.3"]}]\n'
    )
    table = find_table(str(place / "mine.json"))
    assert table == find_table(str(place / "mine.toml"))
    assert table.seeds == (4, 2)
    assert table.detects
    assert table.cases[1].own
    assert table.cases[1].key.startswith("weak-")
    assert table.cases[0].key == "badnets"
    assert [variant.name for variant in narrowed(table, methods=["dbd-0.3"]).variants] == ["dbd-0.3"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"attacks": ["badnet"]}, "there is no attack 'badnet'"),
        ({"attacks": ["badnet"]}, "did you mean 'badnets'"),
        ({"attacks": [{"name": "mine", "attack": "wanett"}]}, "did you mean 'wanet'"),
        ({"methods": ["dbdd"]}, "there is no method 'dbdd'"),
        ({"methods": ["dbdd"]}, "did you mean 'dbd'"),
        ({"methods": []}, "no list methods"),
        ({"atacks": []}, "did you mean 'attacks'"),
        ({"preset": "smok"}, "did you mean 'smoke'"),
        ({"seeds": [0, "1"]}, "whole numbers from 0"),
        ({"seeds": []}, "at least one"),
        ({"holdout_clean": 1.5}, "a share from 0"),
        ({"detects": "yes"}, "true or false"),
        ({"methods": [{"name": "x", "method": "dpsgd", "flags": ["--model.norm", "batch"]}]}, "batch norm"),
        ({"attacks": ["badnets", "badnets"]}, "is there twice"),
        ({"attacks": [{"name": "../x", "attack": "badnets"}]}, "names no folder"),
        ({"attacks": [{"name": "x", "attack": "badnets", "flags": ["--rate", "2"]}]}, "rate"),
        ({"attacks": [{"name": "x", "attack": "badnets", "flags": "--rate 2"}]}, "a list of strings"),
        ({"methods": [{"name": "x", "method": "dbd", "flags": ["--split.keep", "7"]}]}, "split.keep"),
    ],
)
def test_what_a_file_gets_wrong_is_one_message(fields, expected, place, capsys):
    write(place / "mine.json", **fields)
    assert expected in message("mine.json", capsys=capsys)


@pytest.mark.parametrize("text", ["{", "[]", '{"attacks": 1e999}'])
def test_what_is_no_table_file(text, place, capsys):
    (place / "mine.json").write_text(text)
    assert "mine.json" in message("mine.json", capsys=capsys)


def test_names_that_are_near(place, capsys):
    assert "did you mean 'main'" in message("mainn", capsys=capsys)
    assert "cannot be read" in message("gone.toml", capsys=capsys)
    assert "did you mean 'badnets'" in message("main", "--attacks", "badnetz", capsys=capsys)
    assert "did you mean 'dbd'" in message("main", "--methods", "dbdx", capsys=capsys)


@pytest.mark.slow
def test_every_case_fits_the_digits():
    """Their side is known before anything is made."""
    place = Place(storage=Path("runs"))
    for name in BUILT_IN:
        plan(find_table(name, preset_name="smoke"), place)


def test_a_trigger_that_does_not_fit_is_refused_before_anything_is_made(place, capsys):
    path = write(place / "t.json", attacks=[{"name": "wide", "attack": "ctrl", "flags": ["--window", "64"]}])
    said = message(path, "--source", "digits", capsys=capsys)
    assert "t: wide: --window: a window of 64 px does not fit images of 16 px" in said


def test_a_missing_artefact_names_the_command_that_makes_it(place, capsys):
    attack = {
        "name": "lc", "attack": "label-consistent", "flags": ["--artefact", "artefacts/gone"], "craft": ["--eps", "16"]
    }  # fmt: skip
    write(place / "mine.json", attacks=[attack])
    text = message("mine.json", capsys=capsys)
    assert "there is no such artefact" in text
    assert "`dbd craft label-consistent --eps 16 --data " in text
    assert "--out artefacts/gone --preset smoke`" in text


def test_an_artefact_that_cannot_be_read_is_refused_where_the_images_decide_their_size_too(place, capsys):
    (place / "artefact").mkdir()
    attack = {"name": "lc", "attack": "label-consistent", "flags": ["--artefact", "artefact"]}
    write(place / "mine.json", attacks=[attack], source=["parquet", "--root", "images"])
    assert "artefact.json" in message("mine.json", capsys=capsys)


def test_an_artefact_of_one_seed_does_not_fit_a_table_of_several(place, capsys):
    arrays = {"index": np.array([3, 5]), "images": np.zeros((2, 16, 16, 3), np.uint8)}
    write_artefact(
        place / "artefact", "label-consistent", arrays, image_px=16, target=3, fingerprint="f",
        settings={"rate": 0.025, "seed": 1}, evidence={}, versions={},
    )  # fmt: skip
    attack = {"name": "lc", "attack": "label-consistent", "flags": ["--artefact", "artefact"]}
    write(place / "mine.json", attacks=[attack], seeds=[1, 0])
    said = message("mine.json", capsys=capsys)
    assert "of the images that seed 1 chooses, and seed 0 chooses others" in said
    assert "leave --artefact out" in said
    plan(narrowed(find_table("mine.json"), seeds=[1]), Place(storage=Path("runs")))


@pytest.mark.parametrize(
    ("craft", "expected"),
    [(["--epss", "3"], "--eps"), (["--eps", "-3"], "eps"), (["--target", "nobody"], "Error parsing --target")],
)
def test_flags_of_a_craft_are_read_before_anything_is_made(craft, expected, place, capsys):
    write(place / "mine.json", attacks=[{"name": "lc", "attack": "label-consistent", "craft": craft}])
    try:
        code = main(["reproduce", "mine.json"])
    except SystemExit as end:  # the parser's own way out
        code = end.code
    assert code == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in place.iterdir()] == ["mine.json"]


def test_a_preset_without_settings_for_a_method(place, monkeypatch, capsys):
    from dataclasses import dataclass, field

    from dbd_dist.methods.method import Method
    from dbd_dist.stages import Supervised

    @dataclass(frozen=True, kw_only=True)
    class Other(Supervised):
        name = "other"

        @classmethod
        def from_preset(cls, stages):
            return None

    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        name = "mine"
        title = "Mine"
        other: Other = field(default_factory=Other)

    monkeypatch.setattr(Mine, "stage_kinds", classmethod(lambda cls: {"other": Other}))
    monkeypatch.setitem(METHODS._parts(), "mine", Mine)
    write(place / "mine.json", methods=["none", "mine"])
    assert "the preset smoke has no settings for other, a stage of mine" in message("mine.json", capsys=capsys)
