"""Files made to harm: what they promise is held against limits before memory is reserved, and what they name is shown
without being obeyed."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.dataset.manifest import open_dataset, read_manifest
from data_prep.errors import UserError
from data_prep.images import decode_image
from data_prep.io import limits
from data_prep.io.arrays import map_arrays
from data_prep.io.hashes import sha256_json
from data_prep.io.json import parse_json, read_json
from data_prep.io.tables import read_table
from data_prep.pipeline import PrepareConfig, prepare
from data_prep.sources import ImageFolder, Parquet
from dbd_dist.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\u202egnp\n\r\x9b31m"


# -- nothing is ever unpickled


def test_no_reader_can_unpickle():
    """torch.load with weights_only runs nothing; np.load would reserve what a header asks for."""
    for package in ("data_prep", "dbd_dist", "tune_spaces", "cluster"):
        for path in (CHECKOUT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                called = ast.unparse(node.func)
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert called != "np.load", path
                assert called != "torch.load" or options.get("weights_only") == "True", path
                assert options.get("allow_pickle", "False") == "False", path


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_pickles_in_archives_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("trap.npz", x=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="dtype object"):
        map_arrays(Path("trap.npz"), ["x"])
    Path("plain").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="BadZipFile"):
        map_arrays(Path("plain"), ["x"])
    assert not Path("trapped").exists()


# -- counts in headers


def npz(path: Path, header: bytes, body: bytes = b"\0" * 64, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive of one array x with a header of one's own."""
    padded = header + b" " * (63 - (len(header) + 10) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + body
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x.npy", content)
    return path


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,), }", "larger than"),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296), }", "larger than"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 64), }", "larger than"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': (65,), }", "larger than"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': (8,), }", "dtype object"),
        (b"{'descr': '|V8', 'fortran_order': False, 'shape': (8,), }", "dtype"),
        (b"{'descr': '|u1', 'fortran_order': True, 'shape': (8, 8), }", "dtype"),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': __import__('os').getcwd(), }", r"."),
        (b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 400, r"."),
        (b"nothing", r"malformed"),
    ],
)
def test_arrays_larger_than_their_file(header, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        map_arrays(npz(tmp_path / "x.npz", header), ["x"])


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.array("ssl"), "c": np.zeros((0, 4), np.float16)}
    np.savez(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    found = map_arrays(tmp_path / "x.npz", arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    np.savez_compressed(tmp_path / "small.npz", a=np.zeros(10**6))
    with pytest.raises(ValueError, match="compressed"):
        map_arrays(tmp_path / "small.npz", ["a"])
    with pytest.raises(ValueError, match=r"no item named 'z\.npy'"):
        map_arrays(tmp_path / "x.npz", ["z"])


def test_tables_that_declare_too_many_rows_are_not_read(tmp_path, monkeypatch):
    """Equal values are kept as a count: millions of rows in some kilobytes."""
    n = 3_000_000
    columns = {"split": pa.array(["train"]).dictionary_encode().take(pa.array(np.zeros(n, np.int32))).cast(pa.string())}
    columns |= {name: pa.array(np.zeros(n, np.int64)) for name in ("index", "label")}
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    assert path.stat().st_size < 100_000

    def read(*arguments, **options):
        raise AssertionError("it was read")

    monkeypatch.setattr(pq.ParquetFile, "read", read)
    with pytest.raises(UserError, match=r"3,000,000 rows\. Expected: at most 400"):
        read_table(path, {"label": "int64"}, most=400)
    table = pa.table({"image": pa.array([b"x"] * 3), "label": [0, 1, 2]})
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert limits.TABLE_ROWS == 100_000_000
    monkeypatch.setattr(limits, "TABLE_ROWS", 2)
    with pytest.raises(UserError, match=r"3 rows\. Expected: at most 2"):
        Parquet(root=tmp_path).open()


# -- images


def test_image_files_too_large_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.touch()
    os.truncate(path, limits.IMAGE_FILE_BYTES + 1)  # a hole: it takes no disk

    class Unread(io.BufferedReader):
        def read(self, *_):
            raise AssertionError("it was read")

    monkeypatch.setattr(Path, "open", lambda self, mode: Unread(io.FileIO(self, "rb")))
    with pytest.raises(UserError, match="larger than 512 MiB"):
        decode_image(path, where="x")


def test_images_that_declare_too_much_are_refused_without_a_second_word(run_python):
    """Pillow has a limit at which it warns, and one at which it refuses."""
    code = """
import io
from PIL import Image
from data_prep.errors import UserError
from data_prep.images import decode_image
for side in (8193, 9500, 10000, 14000):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, format="PNG")
    try:
        decode_image(buffer.getvalue(), where="x")
    except UserError as error:
        assert "pixels" in str(error)
        print(side)
"""
    done = run_python(code)
    assert done.stdout.split() == ["8193", "9500", "10000", "14000"]
    assert done.stderr == ""


# -- names


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", ".hidden", "x" * 300])
def test_names_of_files_are_names(name, digits, tmp_path):
    content = json.loads((digits / "manifest.json").read_text())
    content["files"][name] = {"bytes": 1, "sha256": "a" * 64}
    del content["checksum"]
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"checksum": sha256_json(content)}))
    with pytest.raises(UserError, match="field files is "):
        read_manifest(tmp_path)


def test_messages_obey_no_escape_code():
    error = UserError(f"what {ESCAPES}", where=f"/data/{ESCAPES}/x.png", expected=ESCAPES, hint=f"do \udcff {ESCAPES}")
    assert str(error).isprintable()
    assert str(error).encode()
    assert r"\x1b]0;owned\x07\x1b[2J\u202egnp\n\r\x9b31m" in str(error)
    assert str(UserError("Größe 数 é", where="/ä")) == "/ä: Größe 数 é."


def test_hostile_class_names_stay_names(make_image_folder, tmp_path, capfd):
    names = ("\x1b[31mred", "<img src=x onerror=alert(1)>")
    make_image_folder(tmp_path / "images", classes=names)
    sizes = ["--image-px", "12", "--resize-px", "12", "--out", str(tmp_path / "made")]
    assert main(["prepare", "imagefolder", "--root", str(tmp_path / "images"), *sizes]) == 0
    assert open_dataset(tmp_path / "made").manifest.class_names == tuple(sorted(names))
    assert main(["doctor", str(tmp_path / "made")]) == 0
    (tmp_path / "images" / "train" / "\x1b[31mred" / "00.png").write_bytes(b"")
    assert main(["prepare", "imagefolder", "--root", str(tmp_path / "images"), *sizes[:-1], str(tmp_path / "x")]) == 2
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err
    assert r"\x1b[31mred" in said.err


# -- links


def test_links_out_of_an_image_folder(make_image_folder, encode_image, tmp_path):
    root = tmp_path / "images"
    make_image_folder(root)
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode_image(np.zeros((12, 12, 3), np.uint8)))
    config = ImageFolder(root=root, image_px=12, resize_px=12)
    before = config.describe()
    inside = root / "train" / "ant" / "inside.png"
    inside.symlink_to("00.png")
    assert len(config.open().train) == 13
    (root / "train" / "ant" / "outside.png").symlink_to(secret)
    with pytest.raises(UserError, match=rf"outside\.png: a link to {re.escape(str(secret))}, outside the image folder"):
        config.open()
    following = ImageFolder(root=root, image_px=12, resize_px=12, follow_links=True)
    assert len(following.open().train) == 14
    assert following.describe() == before  # what may be read is not what the data set is
    with pytest.raises(UserError, match="outside the image folder"):
        prepare(PrepareConfig(source=config, out=tmp_path / "made"), progress=False)
    assert not (tmp_path / "made").exists()
    (tmp_path / "link").symlink_to(root)  # the root may be one: its user named it
    (root / "train" / "ant" / "outside.png").unlink()
    assert len(ImageFolder(root=tmp_path / "link", image_px=12, resize_px=12).open().train) == 13


# -- JSON


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "-1e999", "[" * 100_000, '{"a":' * 50_000, "1" * 5000, ""],
)
def test_json_that_is_none(text, tmp_path):
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert type(error.value) in (ValueError, json.JSONDecodeError)
    (tmp_path / "x").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "x")


def test_json_files_too_large_are_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("[1, 2]")
    assert read_json(tmp_path / "x") == [1, 2]
    monkeypatch.setattr(limits, "JSON_BYTES", 5)
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "y")
