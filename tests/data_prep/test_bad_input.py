"""Everything that a user can get wrong about data, through the command: one message, exit code 2, nothing left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.attacks import WaNet
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.sources import Cifar10
from dbd_dist.cli import main


@pytest.fixture
def refused(tmp_path, capsys, files_below) -> Callable[..., str]:
    """Run ``dbd prepare`` on something that cannot work out; returns its message."""

    def run(*arguments: str | Path) -> str:
        datasets = tmp_path / "datasets"
        capsys.readouterr()
        code = main(["prepare", *map(str, arguments), "--datasets", str(datasets), "--workers", "2"])
        output = capsys.readouterr()
        assert code == 2, output
        assert output.out == ""
        assert output.err.startswith("error: ")
        assert output.err.count("\n") == 1
        assert "Traceback" not in output.err
        assert not datasets.exists()
        return output.err

    return run


def test_a_command_that_works(tmp_path, capsys):
    arguments = ["digits", "badnets", "--train-per-class", "10", "--rate", "0.2", "--datasets", str(tmp_path)]
    assert main(["prepare", *arguments]) == 0
    output = capsys.readouterr()
    assert "100 training (20 poisoned for class 3) and 359 test images of 16 px, 10 classes" in output.out
    assert open_dataset(tmp_path / "digits-10pc-badnets-r0.2-t3-s0").manifest.poisoned == 20


# -------------------------------------------------------------------------------- images


def image_faults(encode_image) -> dict[str, tuple[bytes, str]]:
    png = encode_image(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    jpeg = encode_image(np.zeros((40, 40, 3), np.uint8), "JPEG")
    return {
        "empty": (b"", "the image file is empty"),
        "truncated PNG": (png[: len(png) // 2], "truncated"),
        "truncated JPEG": (jpeg[:-200], "truncated"),
        "foreign": (b"%PDF-1.4 not an image", "not an image that can be read"),
    }


@pytest.mark.parametrize("name", ["empty", "truncated PNG", "truncated JPEG", "foreign"])
def test_image_files(name, encode_image, make_image_folder, parquet_root, write_parquet, tmp_path, refused):
    content, says = image_faults(encode_image)[name]
    make_image_folder(tmp_path / "images")
    (tmp_path / "images" / "test" / "bee" / "03.png").write_bytes(content)
    sizes = ["--image-px", "12", "--resize-px", "12", "--target", "0"]
    message = refused("imagefolder", "badnets", "--root", tmp_path / "images", *sizes)
    assert f"{tmp_path / 'images'}/test/bee/03.png: " in message
    assert says in message
    assert "Expected: a whole image file: JPEG, PNG" in message

    good = encode_image(np.zeros((12, 12, 3), np.uint8))
    write_parquet(parquet_root / "test.parquet", [good] * 8 + [content], [0, 1, 2] * 3, ["disc", "ring", "star"])
    message = refused("parquet", "badnets", "--root", parquet_root, "--target", "0")
    assert f"{parquet_root}/test.parquet#8: " in message
    assert says in message


def test_a_missing_image(parquet_root, write_parquet, encode_image, make_image_folder, tmp_path, refused):
    good = encode_image(np.zeros((12, 12, 3), np.uint8))
    write_parquet(parquet_root / "train.parquet", [good, None, good], [0, 1, 2], ["disc", "ring", "star"])
    message = refused("parquet", "--root", parquet_root)
    assert "train.parquet#1: there is no image" in message
    assert "Expected: the bytes of an image file" in message

    make_image_folder(tmp_path / "images")
    (tmp_path / "images" / "train" / "ant" / "99.png").symlink_to("gone.png")
    message = refused("imagefolder", "--root", tmp_path / "images", "--image-px", "12", "--resize-px", "12")
    assert "train/ant/99.png: cannot read the image (No such file" in message


def test_images_of_other_sizes(parquet_root, write_parquet, encode_image, refused):
    images = [encode_image(np.zeros((px, px, 3), np.uint8)) for px in (12, 12, 8)]
    write_parquet(parquet_root / "train.parquet", images, [0, 1, 2], ["disc", "ring", "star"])
    message = refused("parquet", "--root", parquet_root)
    assert "train.parquet#2: an image of 8 x 8 px among images of 12 x 12 px" in message
    assert "give --image-px" in message
    wide = encode_image(np.zeros((12, 14, 3), np.uint8))
    write_parquet(parquet_root / "train.parquet", [wide] * 3, [0, 1, 2], ["disc", "ring", "star"])
    assert "train.parquet#0: an image of 14 x 12 px is not square" in refused("parquet", "--root", parquet_root)


def test_images_smaller_than_allowed(refused, parquet_root, tmp_path):
    assert "--image-px: images of 7 px. Expected: 8 to 512" in refused("digits", "--image-px", "7")
    assert "--image-px: images of 0 px. Expected: 1" in refused("parquet", "--root", parquet_root, "--image-px", "0")
    message = refused("imagefolder", "--root", tmp_path, "--image-px", "300")
    assert "a crop of 300 px does not fit a shorter side of 256 px" in message


def test_images_larger_than_allowed(refused, parquet_root, tmp_path):
    for huge in ("100000", str(10**20)):
        assert "--image-px: images of 1" in refused("digits", "--image-px", huge)
        assert "Expected: 1 to 8192" in refused("parquet", "--root", parquet_root, "--image-px", huge)
        message = refused("imagefolder", "--root", tmp_path, "--image-px", huge, "--resize-px", huge)
        assert "--image-px: images of 1" in message
        assert "Expected: 1 to 8192" in message
        message = refused("imagefolder", "--root", tmp_path, "--resize-px", huge)
        assert f"--resize-px: a shorter side of {huge} px. Expected: 1 to 8192" in message


@pytest.mark.parametrize("on_bad_image", ["fail", "skip"])
def test_pipes_are_not_waited_for(on_bad_image, refused, parquet_root, make_image_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    attacks = ["badnets", "blended", "adap-blend"] if on_bad_image == "fail" else []
    for attack in attacks:
        message = refused("digits", attack, "--pattern", tmp_path / "pipe")
        assert f"{tmp_path / 'pipe'}: cannot read the trigger image (not a file but a pipe or a device)" in message
    make_image_folder(tmp_path / "images")
    for image in (tmp_path / "images" / "train" / "ant").iterdir():
        image.unlink()
        os.mkfifo(image)
    sizes = ["--image-px", "12", "--resize-px", "12", "--on-bad-image", on_bad_image]
    message = refused("imagefolder", "--root", tmp_path / "images", *sizes)
    assert ("a pipe or a device" if on_bad_image == "fail" else "no train image of class 0 (ant)") in message
    (parquet_root / "train.parquet").unlink()
    os.mkfifo(parquet_root / "train.parquet")
    assert "train.parquet: unreadable Parquet file" in refused("parquet", "--root", parquet_root)
    (tmp_path / "artefact").mkdir()
    os.mkfifo(tmp_path / "artefact" / "artefact.json")
    assert "artefact.json cannot be read" in refused("digits", "adaptive", "--artefact", tmp_path / "artefact")


def test_damaged_tables_of_images(parquet_root, refused):
    path = parquet_root / "train.parquet"
    whole = path.read_bytes()
    for content in (b"", whole[:-50], b"PK\x03\x04" * 100):
        path.write_bytes(content)
        message = refused("parquet", "--root", parquet_root)
        assert f"{path}: unreadable Parquet file" in message
        assert "Expected: a complete Parquet file" in message


# -------------------------------------------------------------------------------- classes


def test_a_wrong_class_count(make_image_folder, parquet_root, write_parquet, encode_image, tmp_path, refused):
    make_image_folder(tmp_path / "one", classes=("ant",))
    assert "one: 1 class only. Expected: two or more classes" in refused("imagefolder", "--root", tmp_path / "one")

    make_image_folder(tmp_path / "more")
    (tmp_path / "more" / "train" / "cow").mkdir()
    message = refused("imagefolder", "--root", tmp_path / "more")
    assert "more/train/cow: the class folder is empty. Expected: at least one image a class" in message
    (tmp_path / "more" / "train" / "cow").rename(tmp_path / "more" / "test" / "cow")
    message = refused("imagefolder", "--root", tmp_path / "more")
    assert "more/test: classes differ from those in train: unknown cow" in message

    good = encode_image(np.zeros((12, 12, 3), np.uint8))
    write_parquet(parquet_root / "train.parquet", [good] * 4, [0, 1, 2, 3], ["disc", "ring", "star"])
    message = refused("parquet", "--root", parquet_root)
    assert "train row 3: label 3 is not a class. Expected: 0 to 2, as there are 3 class names" in message
    write_parquet(parquet_root / "train.parquet", [good] * 3, [0, 1, 2], ["disc", "ring"])
    assert "class names differ from those before" in refused("parquet", "--root", parquet_root)


@pytest.mark.parametrize("target", [10, 99, -1])
def test_a_target_that_is_no_class(target, refused):
    message = refused("digits", "badnets", "--target", str(target))
    assert "target" in message
    assert "Expected: 0" in message


def test_a_target_where_there_is_none(refused, make_image_folder, tmp_path, capsys):
    message = refused("digits", "badnets", "--mapping", "all-to-all", "--target", "3")
    assert "--target: target 3 is given, and all-to-all has none" in message
    make_image_folder(tmp_path / "images", classes=("ant", "bee"))  # the protocol's target, 3, is no class here
    sizes = ["--image-px", "12", "--resize-px", "12", "--rate", "0.3", "--datasets", str(tmp_path)]
    arguments = ["imagefolder", "badnets", "--mapping", "all-to-all", "--root", str(tmp_path / "images"), *sizes]
    assert main(["prepare", *arguments]) == 0


@pytest.mark.parametrize("flag", ["--rate=0.05", "--target=3", "--protocol=bench"])
def test_numbers_of_an_attack_without_one(flag, refused):
    for clean in (["digits"], ["digits", "clean"]):
        message = refused(*clean, flag)
        assert message.startswith(f"error: {flag.split('=')[0]}: ")
        assert "name an attack after the source" in message


# -------------------------------------------------------------------------------- attacks


@pytest.mark.parametrize(
    ("rate", "says"),
    [
        ("0", "poisoning rate 0 is out of range. Expected: a fraction strictly between 0 and 1. Hint: for a data set"),
        (
            "5",
            "poisoning rate 5 is out of range. Expected: a fraction strictly between 0 and 1. Hint: for 5 % say 0.05",
        ),
        ("500", "poisoning rate 500 is out of range"),
        ("1", "out of range"),
        ("-0.1", "out of range"),
        ("nan", "out of range"),
        ("inf", "out of range"),
        ("0.9", "asks for 90 of 100 images, only 90"),
        ("0.91", "asks for 91 of 100 images, only 90 can be poisoned. Expected: at most 0.9"),
        ("0.001", "of 100 images is less than one image. Expected: at least 0.01"),
    ],
)
def test_poisoning_rates(rate, says, refused, tmp_path):
    arguments = ["digits", "badnets", "--train-per-class", "10", "--rate", rate]
    if rate == "0.9":  # all that the other classes hold
        assert main(["prepare", *arguments, "--datasets", str(tmp_path)]) == 0
        return
    message = refused(*arguments)
    assert message.startswith("error: --rate: ")
    assert says in message


@pytest.mark.parametrize("rate", ["5%", "five", ""])
def test_rates_that_are_no_numbers(rate, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", "digits", "badnets", "--rate", rate, "--datasets", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--rate" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_triggers_that_do_not_fit(refused, tmp_path):
    message = refused("digits", "badnets", "--patch-px", "17")
    assert "--patch-px: a patch of 17 px is larger than the image of 16 px. Expected: 1 to 16" in message
    message = refused("digits", "badnets", "--row", "14", "--col", "0")
    assert "a patch of 3 px at row 14, column 0 sticks out of the image of 16 px. Expected: rows and columns" in message
    (tmp_path / "trigger.png").write_text("no image")
    assert "trigger.png: " in refused("digits", "badnets", "--pattern", tmp_path / "trigger.png")
    message = refused("digits", "blended", "--pattern", tmp_path / "gone.png")
    assert "gone.png: cannot read the trigger image (No such file" in message
    assert "--alpha: alpha 1.5 is out of range" in refused("digits", "blended", "--alpha", "1.5")
    for content, says in ((b"", "the trigger image file is empty"), (b"no image", "not an image that can be read")):
        (tmp_path / "trigger.png").write_bytes(content)
        message = refused("digits", "blended", "--pattern", tmp_path / "trigger.png")
        assert f"trigger.png: {says}. Expected: a whole image file: JPEG, PNG" in message


def test_warps_that_do_not_fit(refused, make_image_folder, tmp_path):
    for grid in ("17", "100000", str(10**20)):
        assert "px. Expected: 2 to 16" in refused("digits", "wanet", "--grid", grid)
    message = refused("digits", "wanet", "--strength", "1e308")
    assert "out of the image" in message
    assert "at most 4.06 for images of 16 px" in message
    make_image_folder(tmp_path / "images")
    sizes = ["--image-px", "1", "--resize-px", "1", "--target", "0", "--rate", "0.3"]
    assert "grid: a grid of 4 does not fit 1 px" in refused(
        "imagefolder", "wanet", "--root", tmp_path / "images", *sizes
    )


@pytest.mark.parametrize(
    "attack", [["sig", "--frequency", "8"], ["sig", "--delta", "0.3"], ["blended", "--alpha", "0.000001"]]
)
def test_triggers_that_change_nothing(attack, refused):
    message = refused("digits", *attack, "--train-per-class", "40", "--test-per-class", "2")
    assert message.splitlines()[-1].startswith(f"error: {attack[0]}: the trigger changes no pixel")
    assert "stronger" in message


def test_numbers_too_large_for_a_float_are_named_whole(refused):
    assert WaNet(field_seed=12345678).slug != WaNet(field_seed=12345679).slug
    assert "File name too long" in refused("digits", "wanet", "--field-seed", str(10**400))


# -------------------------------------------------------------------------------- places


def test_sources_that_are_not_there(refused, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    nowhere = tmp_path / "nowhere"
    message = refused("cifar10", "--root", nowhere, "--no-download")
    assert f"{nowhere}: CIFAR-10 is not there" in message

    def fail(self) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(CIFAR10, "download", fail)
    assert "Name or service not known" in refused("cifar10", "--root", nowhere)
    assert f"{nowhere}: not an image folder. Expected: ROOT/train" in refused("imagefolder", "--root", nowhere)
    assert f"{nowhere}: no such folder" in refused("parquet", "--root", nowhere)
    with pytest.raises(UserError):
        Cifar10(root=nowhere, download=False).open()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for source in ("imagefolder", "parquet", "cifar10"):
        assert f"{tmp_path / 'circle'}: " in refused(source, "--root", tmp_path / "circle")


def test_places_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("dear")
    assert "file: is a file" in refused("digits", "--out", tmp_path / "file")
    message = refused("digits", "--out", tmp_path / "file" / "below")
    assert "file" in message
    assert "Not a directory" in message
    assert "File name too long" in refused("digits", "--out", tmp_path / ("a" * 300))
    assert (tmp_path / "file").read_text() == "dear"
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in refused("digits", "--out", tmp_path / "locked" / "x")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["digits", "nonsense"], ["digits", "--no-such-flag"], ["parquet"], [], ["digits", "--seed", "x"]],
)
def test_flags_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prepare", *arguments])
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_numbers_below_what_makes_sense(refused):
    for flag, value in (("--seed", "-1"), ("--train-per-class", "0"), ("--subset-seed", "-1")):
        message = refused("digits", "badnets", flag, value)
        assert flag in message
        assert "Expected: " in message
    assert "untrusted images are not poisoned" in refused("digits", "badnets", "--untrusted")


# -------------------------------------------------------------------------------- dataset folders


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda p: os.truncate(p, p.stat().st_size // 2), "truncated or of another data set"),
        (lambda p: p.write_bytes(bytes(p.stat().st_size)), "sha256 is not that of the manifest"),
        (Path.unlink, "the file is missing"),
    ],
)
def test_damage_is_found_by_training_and_by_preparing_again(harm, says, digits_copy, capsys, tmp_path):
    harm(digits_copy / "train.beton")
    with pytest.raises(UserError, match=says):
        open_dataset(digits_copy)
    before = sorted(p.name for p in digits_copy.iterdir())
    same = ["digits", "badnets", "--train-per-class", "24", "--test-per-class", "5", "--rate", "0.1"]
    for command in (
        ["prepare", *same, "--out", str(digits_copy)],
        ["train", "smoke", "--data", str(digits_copy), "--launcher", "local", "--storage", str(tmp_path / "runs")],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith(f"error: {digits_copy / 'train.beton'}: ")
        assert says in error
    assert sorted(p.name for p in digits_copy.iterdir()) == before
