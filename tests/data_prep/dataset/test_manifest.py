from __future__ import annotations

import json
import os
import shutil

import pytest

from data_prep.dataset.manifest import open_dataset, read_manifest
from data_prep.errors import UserError
from data_prep.io.hashes import data_hash, sha256_json
from data_prep.io.json import sealed, write_json


def rewrite(folder, **changes) -> None:
    """Change fields as a careful forger would: with a checksum that fits."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | changes
    content.pop("checksum")
    content["checksum"] = sha256_json(content)
    path.write_text(json.dumps(content))


def refused(folder, says: str, **options) -> UserError:
    with pytest.raises(UserError, match=says) as error:
        open_dataset(folder, **options)
    return error.value


def test_a_copy_is_as_good(digits, digits_copy):
    assert read_manifest(digits_copy) == read_manifest(digits)
    rewrite(digits_copy)
    dataset = open_dataset(str(digits_copy))
    assert dataset.train == digits_copy / "train.beton"
    assert dataset.test == digits_copy / "test.beton"
    assert dataset.test_triggered == digits_copy / "test_triggered.beton"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not a dataset folder"),
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a JSON object"),
        ('"manifest"', "not a JSON object"),
        ("{}", "format_version is None"),
        ('{"format_version": 5}', "format_version is 5"),
        ('{"format_version": 2}', "missing field attack"),
        ('{"format_version": true}', "format_version is True"),
        ('{"format_version": 1}', "missing field attack"),
        (b"\xff\xfe\x00", "not JSON"),
    ],
)
def test_manifests_that_are_none(content, says, tmp_path):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(tmp_path, says)
    assert str(tmp_path) in str(error.where)


def test_no_folder_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        assert refused(path, "not a dataset folder").where == path


MISTYPED = {
    "format_version": ["1", 0],
    "name": [None, 3],
    "source": [{}, {"kind": 3}, "digits"],
    "attack": [{}, None],
    "rate": ["0.05", 0.0, 5.0, 1, -0.1],
    "target": [-1, "3", 1.5, True],
    "protocol": ["other", 3],
    "holdout_clean": ["0.05", 0.0, 1, True],
    "label_map": [None, {}, [-1], ["3"], [True]],
    "selection": ["dice", 0],
    "covers": [-1, None],
    "stealth": [{"ssim": "0.9"}, [], 3],
    "encoding": [
        {},
        "raw",
        None,
        {"kind": "png"},
        {"kind": "raw", "quality": 95},
        {"kind": "jpeg"},
        {"kind": "jpeg", "quality": 0, "subsampling": "4:4:4"},
        {"kind": "jpeg", "quality": 95, "subsampling": 444},
    ],
    "encoding_psnr_db": ["40", True, []],
    "seed": [-1, 0.5, None],
    "num_classes": [1, 0, "10", 10.0],
    "class_names": ["0123456789", [1] * 10, None],
    "image_px": [0, -16, 16.0, "16"],
    "counts": [{"train": 0}, {"train": "240"}, [240]],
    "poisoned": [-1, 1.5, None],
    "content_hash": [{"train": "abc"}, {"train": "G" * 64}, "a" * 64],
    "data_hash": ["", "a" * 63, None],
    "files": [{"../x": {"bytes": 1, "sha256": "a" * 64}}, {"x": {"bytes": -1, "sha256": "a" * 64}}, {"x": 3}, []],
    "versions": [{"numpy": 1}, []],
    "skipped": ["", [1], None],
    "conversions": [None, [], {"palette": 0}, {"palette": "1"}],
    "notes": ["", [1], None],
    "checksum": [None, "a" * 10],
}


@pytest.mark.parametrize("field", MISTYPED)
def test_every_field_is_checked(field, digits, tmp_path):
    content = json.loads((digits / "manifest.json").read_text())
    path = tmp_path / "manifest.json"
    for value in MISTYPED[field]:
        path.write_text(json.dumps(content | {field: value}))
        error = refused(tmp_path, rf"manifest\.json: field {field} is ")
        assert error.expected
    path.write_text(json.dumps({name: value for name, value in content.items() if name != field}))
    refused(tmp_path, "format_version is None" if field == "format_version" else f"missing field {field}")
    assert set(MISTYPED) == set(content)


def test_folders_of_older_versions_open(digits, digits_copy):
    content = json.loads((digits / "manifest.json").read_text())
    del content["holdout_clean"], content["conversions"], content["notes"], content["checksum"]
    write_json(digits_copy / "manifest.json", sealed(content | {"format_version": 3}))
    assert open_dataset(digits_copy).manifest == open_dataset(digits).manifest
    del content["label_map"]
    content |= {"setting": content.pop("protocol"), "format_version": 2}
    write_json(digits_copy / "manifest.json", sealed(content))
    assert open_dataset(digits_copy).manifest == open_dataset(digits).manifest
    del content["encoding"], content["encoding_psnr_db"]
    write_json(digits_copy / "manifest.json", sealed(content | {"format_version": 1}))
    assert open_dataset(digits_copy).manifest == open_dataset(digits).manifest
    rewrite(digits_copy, encoding={"kind": "raw"})
    refused(digits_copy, "unknown field encoding")


def test_an_unknown_field(digits_copy):
    rewrite(digits_copy, colour="red")
    refused(digits_copy, "unknown field colour")


def test_an_edited_manifest(digits_copy, edit_json):
    edit_json(digits_copy / "manifest.json", seed=7)
    refused(digits_copy, "edited since it was written: its checksum")


def test_fields_that_contradict_each_other(digits, digits_copy):
    manifest = read_manifest(digits)
    hashes = dict(manifest.content_hash) | {"train": "a" * 64}
    files = json.loads((digits / "manifest.json").read_text())["files"]
    for says, changes in {
        "class_names holds 9 names": {"class_names": list(manifest.class_names[:9])},
        "counts is about test, train": {"counts": {"train": 240, "test": 50}},
        "content_hash is about": {"content_hash": {"train": "a" * 64}},
        "counts is about test, test_triggered, train, not test, train": {"attack": {"kind": "clean"}},
        "counts is about test, test_triggered, train, not holdout, ": {"holdout_clean": 0.05},
        "target is 10, no class": {"target": 10},
        "label_map holds 9 labels": {"label_map": [3] * 9},
        "label_map holds 0 labels": {"label_map": []},
        "label_map holds 10, no class": {"label_map": [10] * 10},
        "poisoned and covers are 241 and 0": {"poisoned": 241},
        "field stealth is None": {"stealth": None},
        "encoding_psnr_db is 40.0": {"encoding_psnr_db": 40.0},
        "data_hash is not that": {"content_hash": hashes},
        r"files lacks test\.beton": {"files": {n: r for n, r in files.items() if n != "test.beton"}},
    }.items():
        shutil.copy(digits / "manifest.json", digits_copy)
        rewrite(digits_copy, **changes)
        refused(digits_copy, says)
    rewrite(digits_copy, content_hash=hashes, data_hash=data_hash(hashes))


@pytest.mark.parametrize(
    "name", ["train.beton", "test.beton", "test_triggered.beton", "samples.parquet", "truth.parquet", "preview.png"]
)
def test_every_file_is_checked(name, digits_copy):
    path = digits_copy / name
    whole = path.read_bytes()

    def flipped(position: int) -> bytes:
        edited = bytearray(whole)
        edited[position] ^= 1
        return bytes(edited)

    faults = {
        "truncated": whole[:-1],
        "bytes, the manifest says": whole + b"\0",
        "sha256": flipped(len(whole) // 2),
        "sha256 is not": flipped(0),
    }
    for says, content in faults.items():
        path.write_bytes(content)
        assert refused(digits_copy, says).where == path
    path.unlink()
    assert refused(digits_copy, "the file is missing").where == path
    open_dataset(digits_copy, verify=False)
    path.write_bytes(whole)
    open_dataset(digits_copy)


def test_a_flipped_pixel(digits_copy):
    """Accepted by every check of the .beton itself."""
    path = digits_copy / "train.beton"
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek((2 << 20) + 1000)
        byte = file.read(1)[0]
        file.seek((2 << 20) + 1000)
        file.write(bytes([byte ^ 255]))
    assert path.stat().st_size == stat.st_size
    assert refused(digits_copy, r"train\.beton: the file's sha256 is not that of the manifest").where == path


def test_the_manifest_of_another_data_set(digits_copy, tmp_path):
    from data_prep.attacks import BadNets
    from data_prep.config import PrepareConfig
    from data_prep.pipeline import prepare
    from data_prep.sources import Digits

    source = Digits(train_per_class=4, test_per_class=2)
    other = prepare(
        PrepareConfig(source=source, attack=BadNets(), datasets=tmp_path / "o", workers=1), progress=False
    ).folder
    shutil.copy(other / "manifest.json", digits_copy)
    error = refused(digits_copy, "another data set")
    assert error.where == digits_copy / "manifest.json"
    shutil.copy(other / "train.beton", digits_copy)
    refused(digits_copy, "the file has .* bytes, the manifest says .* of another data set")


def test_a_folder_that_may_not_be_read(digits_copy):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (digits_copy / "manifest.json").chmod(0)
    refused(digits_copy, "cannot read the manifest")
