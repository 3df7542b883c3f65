"""Mistakes on the command line: exit code 2, one message that names the place and what is allowed, nothing written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster import topology
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist.cli import COMMANDS, main
from dbd_dist.models.heads import Classifier
from dbd_dist.presets import PRESETS
from dbd_dist.runtime.run_folder import RunFolder

FITTING = ("--simclr.batch", "60", "--warmup.batch", "60", "--compute.workers", "1", "--compute.device", "cpu")
"""The smoke preset on the smaller data set of the tests."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, where nothing may appear."""
    place = tmp_path / "work"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("RAY_ADDRESS", "local")  # whatever runs on this machine
    monkeypatch.delenv("DBD_STORAGE", raising=False)
    return place


Refused = Callable[..., str]


@pytest.fixture
def refused(place, capsys) -> Refused:
    """Runs a command that must fail as promised; gives its message."""

    def run(*argv: str | Path) -> str:
        before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as end:  # tyro's own way out
            code = end.code
        out, message = capsys.readouterr()
        assert code == 2, message
        assert "Traceback" not in out + message
        assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
        assert {p for p in place.rglob("*") if p.is_dir()} == {
            d for p in before for d in p.parents if place in d.parents
        }
        return message

    return run


@pytest.fixture
def refused_train(refused, digits) -> Refused:
    """The same for `dbd train smoke` on the test's data set; later flags win."""

    def run(*flags: str | Path) -> str:
        message = refused("train", "smoke", "--data", digits, "--launcher", "local", *FITTING, *flags)
        assert message.count("error:") <= 1
        return message

    return run


def one_line(message: str) -> bool:
    return message.startswith("error: ") and message.count("\n") == 1


def unboxed(message: str) -> str:
    """What tyro says, without its frame."""
    return " ".join(message.replace("│", " ").split())


# -- commands


def test_no_command_shows_the_usage(capsys, place):
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == shown


def test_unknown_command_names_the_near_one_and_all(refused):
    message = refused("trian")
    assert one_line(message)
    assert "'trian'" in message
    assert "Did you mean 'train'?" in message
    assert all(name in message for name in COMMANDS)


def test_the_command_itself_exits_with_2_and_help_needs_no_torch(place):
    done = subprocess.run([sys.executable, "-m", "dbd_dist.cli", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert one_line(done.stderr)
    code = "import sys, dbd_dist.cli; dbd_dist.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_debug_raises_what_is_otherwise_a_message(place):
    with pytest.raises(UserError, match="there is no preset"):
        main(["train", "--debug", "nonsense"])


def test_interrupt_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("dbd_dist.commands.train.main", interrupt)
    assert main(["train", "smoke"]) == 130
    assert "resumes from the last checkpoint" in capsys.readouterr().err


# -- presets, fields, values


def test_unknown_preset(refused):
    message = refused("train", "smokey")
    assert one_line(message)
    assert "'smokey'" in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize("argument", ["a\0b", "\ud800"])
def test_arguments_that_no_system_passes_on(refused, argument):
    assert one_line(refused("report", argument))


def test_no_preset(refused):
    assert "no preset is named" in refused("train")
    assert "no preset is named" in refused("train", "--seed", "1")


def test_unknown_field(refused_train):
    message = unboxed(refused_train("--simclr.learning-rate", "0.1"))
    assert "--simclr.learning-rate" in message
    assert "nrecognized" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("--simclr.lr", "fast"), ("--seed", "1.5"), ("--simclr.symmetric", "maybe"), ("--model.widths", "wide")],
)
def test_values_of_the_wrong_type_name_the_field(refused_train, field, value):
    message = unboxed(refused_train(field, value))
    assert field in message
    assert value in message


@pytest.mark.parametrize(
    ("flags", "where", "expected"),
    [
        (("--split.keep", "1.5"), "split.keep", "in (0, 1)"),
        (("--simclr.batch", "0"), "simclr.batch", ">= 2"),
        (("--simclr.lr", "nan"), "simclr.lr", "> 0"),
        (("--seed", "-1"), "seed", ">= 0"),
        (("--model.widths", "8", "16"), "model.widths", "one depth and one width per stage"),
        (("--simclr.schedule-epochs", "1"), "simclr.schedule_epochs", "at least simclr.epochs = 2"),
        (("--simclr.batch", "241"), "simclr.batch", "at most 240"),
        (("--mixmatch.batch", "121"), "mixmatch.batch", "at most 120"),
        (("--split.keep", "0.99"), "mixmatch.batch", "at most 2"),
    ],
)
def test_values_out_of_range_name_the_field_and_the_range(refused_train, place, flags, where, expected):
    message = refused_train("--storage", place / "runs", *flags)
    assert one_line(message)
    assert where in message
    assert expected in message


def test_unknown_choice_lists_the_choices(refused_train):
    message = unboxed(refused_train("--warmup.loss", "focal"))
    assert "focal" in message
    assert "sce" in message


def test_more_workers_than_the_machine_has(refused, digits):
    workers = topology.this_machine().cpus + 1
    message = refused(
        "train", "smoke", "--data", digits, *FITTING, "--compute.workers", workers, "--simclr.batch", 2 * workers
    )  # fmt: skip
    assert one_line(message)
    assert "compute.workers" in message
    assert str(topology.this_machine().cpus) in message


def test_cuda_on_a_machine_without(refused_train, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused_train("--compute.device", "cuda")
    assert one_line(message)
    assert "compute.device" in message
    assert "auto, cpu" in message


def test_images_too_small_for_the_stem(refused_train, digits):
    message = refused_train("--model.stem", "imagenet")
    assert one_line(message)
    assert str(digits) in message
    assert "16 px" in message
    assert "at least 32 px" in message


# -- files


def test_data_folder_that_is_not_there_or_none(refused_train, place):
    for folder in (place / "nothing", place):
        message = refused_train("--data", folder)
        assert one_line(message)
        assert str(folder) in message
        assert "dbd prepare" in message


def test_edited_manifest(refused_train, digits_copy, edit_json):
    edit_json(digits_copy / "manifest.json", poisoned=0)
    message = refused_train("--data", digits_copy)
    assert one_line(message)
    assert str(digits_copy / "manifest.json") in message
    assert "edited" in message


def test_damaged_images(refused_train, digits_copy):
    path = digits_copy / "train.beton"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    message = refused_train("--data", digits_copy)
    assert one_line(message)
    assert str(path) in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("not json", "not a run description"),
        ("[" * 100_000, "not a run description"),
        ('{"config": {"simclr": {"lr": 1' + "0" * 400 + "}}}", "simclr.lr"),
        ("[]", "not a run description"),
        ('{"seed": 1}', "not a run description"),
        ('{"config": {"seeds": 1}}', "unknown field 'seeds'"),
        ('{"config": {"simclr": {"lr": "fast"}}}', "config.simclr.lr"),
        ('{"config": {"split": {"keep": 2.0}}}', "split.keep"),
        ('{"config": null}', "is not an object"),
    ],
)
def test_wrong_config_file(refused, place, content, says):
    path = place / "run.json"
    if content is not None:
        path.write_text(content)
    message = refused("train", "--config", path, "--launcher", "local")
    assert one_line(message)
    assert says in message
    if says not in ("split.keep", "simclr.lr"):  # a range does not know what file it was broken in
        assert str(path) in message
    assert refused("train", f"--config={path}", "--launcher", "local") == message


def test_config_without_a_file(refused):
    assert "--config" in refused("train", "--config")


def test_config_without_data(refused, place):
    (place / "run.json").write_text(json.dumps({"config": {}}))
    message = refused("train", "--config", place / "run.json", "--launcher", "local")
    assert one_line(message)
    assert "--data" in message


def test_other_configuration_in_the_same_folder(refused_train, digits, smoke_config, place):
    folder = RunFolder(place / "runs" / "mine")
    folder.claim(dataclasses.replace(smoke_config, seed=4), open_dataset(digits))
    message = refused_train("--name", "mine", "--storage", place / "runs", "--seed", "5")
    assert one_line(message)
    assert str(folder.path) in message
    assert "another configuration" in message
    assert "--name" in message


def test_run_description_that_is_damaged(refused_train, place):
    path = place / "runs" / "mine" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    message = refused_train("--name", "mine", "--storage", place / "runs")
    assert one_line(message)
    assert str(path) in message


# -- storage and names


@pytest.mark.parametrize("command", [("demo",), ("tune", "sce"), ("reproduce", "main")])
@pytest.mark.parametrize("storage", ["s3://bucket/runs", "gs://bucket"])
def test_storage_in_a_bucket(refused, command, storage):
    message = refused(*command, "--storage", storage)
    assert one_line(message)
    assert storage.split(":")[0] in message
    assert "a folder that all machines see" in message


def test_storage_that_is_a_file(refused_train, place):
    (place / "runs").write_text("")
    message = refused_train("--storage", place / "runs")
    assert one_line(message)
    assert str(place / "runs") in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../elsewhere",
        "a/../../b",
        "/tmp/elsewhere",
        "stages",
        "datasets/x",
        ".a",
        "a/.b",
        "a/ray",
        "a/logs/b",
    ],
)
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_names_that_are_empty_or_leave_the_storage(refused_train, place, launcher, name):
    message = refused_train("--name", name, "--storage", place / "runs", "--launcher", launcher)
    assert one_line(message)
    assert "--name" in message
    assert repr(name) in message
    assert "a folder name" in message


@pytest.mark.parametrize("name", [" ", "a\nb", "a\x1b[31m", "x" * 256, "a/" * 2000])
def test_names_that_are_too_long_or_cannot_be_printed(refused_train, name):
    message = refused_train(f"--name={name}", "--storage", "runs")
    assert one_line(message)
    assert "--name" in message
    assert "at most 255 characters" in message


@pytest.mark.parametrize("flag", ["--name", "--storage", "--data"])
@pytest.mark.parametrize("value", ["\udcff", "a\0b"])
def test_what_is_no_text_is_no_path(refused_train, flag, value):
    message = refused_train(f"{flag}={value}")
    assert one_line(message)
    assert "not valid UTF-8" in message
    assert flag in message


@pytest.mark.parametrize("name", ["file", "file/below", "circle"])
def test_names_that_are_not_free_to_be_folders(refused_train, place, name):
    (place / "runs").mkdir()
    (place / "runs" / "file").write_text("dear")
    (place / "runs" / "circle").symlink_to("circle")
    message = refused_train("--name", name, "--storage", "runs")
    assert one_line(message)
    assert f"runs/{name}" in message
    assert "another --name" in message


@pytest.mark.parametrize("file", ["run.json", "result.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "torn"])
def test_files_of_a_run_that_cannot_be_read(digits, smoke_config, place, file, kind):
    folder = RunFolder(place)
    path = folder.path / file
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "torn": lambda: path.write_text("{")}[kind]()
    with pytest.raises(UserError, match="not a run description" if file == "run.json" else "not a result") as error:
        folder.claim(smoke_config, open_dataset(digits)) if file == "run.json" else folder.result()
    assert error.value.where == path


def test_storage_with_a_name_that_is_too_long(refused_train):
    message = refused_train("--storage", "x" * 300)
    assert one_line(message)
    assert "File name too long" in message


# -- other commands


def test_unknown_space_of_a_sweep(refused):
    message = refused("tune", "everything")
    assert one_line(message)
    assert "'everything'" in message
    assert "sce, filter" in message


def test_unknown_preset_of_a_sweep(refused):
    message = refused("tune", "sce", "--preset", "smokey")
    assert one_line(message)
    assert "'smokey'" in message


def test_evaluating_what_is_no_run(refused, place):
    message = refused("evaluate", place / "nothing")
    assert one_line(message)
    assert str(place / "nothing" / "model.json") in message
    assert "finished run" in message


def test_a_name_of_the_demo_is_refused_before_its_data_is_made(refused):
    assert "--name" in refused("demo", "--name", "..")


def test_evaluating_on_images_of_another_size(refused, digits, smoke_config, place, edit_sealed):
    folder, dataset = RunFolder(place), open_dataset(digits)
    folder.write_model(Classifier(smoke_config.model, 10).state_dict(), smoke_config, dataset, smoke_config.normalise)
    path = place / "model.json"
    whole = json.loads(path.read_text())
    edit_sealed(path, image_px=32)
    message = refused("evaluate", place, "--data", digits)
    assert one_line(message)
    assert "images of 16 px, the model is for 32 px" in message
    wrong = ({"std": [0, 1, 1]}, {"mean": [1, 2]}, {"class_names": "0123456789"}, {"image_px": 16.7}, {"image_px": 0})
    for fields in wrong:
        edit_sealed(path, **fields)
        message = refused("evaluate", place, "--data", digits)
        assert "not the description of a network" in message
        assert "checksum" not in message
    nan = json.dumps(whole | {"mean": [float("nan")] * 3})
    for content in (nan, "[" * 100_000, json.dumps(whole | {"image_px": 32}), json.dumps(whole | {"more": 1})):
        path.write_text(content)
        assert "not the description of a network" in refused("evaluate", place, "--data", digits)


def test_report_to_a_place_that_is_none(refused, place):
    folder = place / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"config": {}}')
    (folder / "result.json").write_text('{"method": "none", "dataset": "x", "clean_acc": 0.5}')
    for out, says in (("", "the path is empty"), (".", "is a folder"), ("x" * 300, "File name too long")):
        message = refused("report", folder, "--format", "md", "--out", out)
        assert one_line(message)
        assert says in message
    for field in ("attack", "preset"):
        (folder / "result.json").write_text(f'{{"method": "none", "dataset": "x", "clean_acc": 0.5, "{field}": []}}')
        assert f"field {field}" in refused("report", folder)
    (place / "circle").symlink_to("circle")
    assert "circle: there is no such run folder" in refused("report", place / "circle")
    assert "...: file name too long." in refused("report", "a" * 300)


def test_report_of_what_is_no_run(refused, place):
    message = refused("report", place / "nothing")
    assert one_line(message)
    assert str(place / "nothing") in message
