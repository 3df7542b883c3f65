"""Bundles for hosts without network: parts, hashes, the script; FFCV's wheel with its libraries inside."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster import bundle
from dbd_dist.cli import main

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ROOT = Path(__file__).resolve().parents[2]


def small_wheel(folder: Path) -> Path:
    """A package of one module, as a wheel."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny.py", "ANSWER = 42\n" + "#" * 5000)
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def made(tmp_path) -> Path:
    """A bundle of a small wheel."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    small_wheel(wheels)
    bundle.write_parts(wheels, tmp_path / "bundle", 4096, python=HERE, name="tiny")
    return tmp_path / "bundle"


def install(folder: Path, target: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", **environ}
    command = ["bash", str(folder / "install.sh"), str(target)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_parts_have_the_size_and_install_without_network(made, tmp_path):
    sizes = [path.stat().st_size for path in sorted(made.glob("bundle.part-*"))]
    assert len(sizes) > 1
    assert set(sizes[:-1]) == {4096}
    assert 0 < sizes[-1] <= 4096
    done = install(made, tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    ask = [tmp_path / "venv/bin/python", "-c", "import tiny; print(tiny.ANSWER)"]
    assert subprocess.run(ask, capture_output=True, text=True, check=True).stdout == "42\n"
    assert "is there already" in install(made, tmp_path / "venv").stderr


def test_a_damaged_part_and_another_python_are_refused(made, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\necho 3.9\n")
    (tmp_path / "python3").chmod(0o755)
    assert "this bundle is for" in install(made, tmp_path / "venv", PYTHON=str(tmp_path / "python3")).stderr
    part = next(made.glob("bundle.part-*"))
    part.write_bytes(b"x" + part.read_bytes()[1:])
    done = install(made, tmp_path / "venv")
    assert done.returncode == 2
    assert "a part is missing or damaged" in done.stderr
    part.unlink()
    assert install(made, tmp_path / "venv").returncode == 2
    assert not (tmp_path / "venv").exists()


def test_what_is_downloaded_is_what_the_projects_need():
    wanted = {Requirement(text).name.lower() for text in bundle.requirements("3.12")}
    assert {"torch", "torchvision", "ray", "jinja2", "opencv-python", "numba", "pip"} <= wanted
    assert "ffcv" not in wanted
    assert "pytest" not in wanted  # of an extra


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--parts-of", "60"], "a size such as 60MB"),
        (["--parts-of", "0MB"], "a size such as 60MB"),
        (["--python", "3.9"], "3.11, 3.12 or 3.13"),
        (["--out", str(ROOT / "tests")], "is there already"),
        (["--constraints", "/nowhere"], "is not a file"),
    ],
)
def test_mistakes_are_one_message(argv, words, tmp_path, capsys):
    out = [] if "--out" in argv else ["--out", str(tmp_path / "b")]
    assert main(["cluster", "bundle", *argv, *out]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_ffcv_brings_its_libraries_and_fits_later_pythons(tmp_path):
    if importlib.util.find_spec("auditwheel") is None or shutil.which("patchelf") is None:
        pytest.skip("auditwheel and patchelf are not installed")
    bundle.ffcv_wheel(tmp_path)
    (path,) = tmp_path.glob("ffcv-*.whl")
    assert "-cp311-abi3-manylinux_2_" in path.name
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "tree")
    assert any(name.startswith("ffcv.libs/libopencv_core") for name in names)
    assert any(name.startswith("ffcv.libs/libturbojpeg") for name in names)
    (library,) = (tmp_path / "tree" / "ffcv").glob("_libffcv*.so")
    loaded = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    for line in loaded.splitlines():
        if "opencv" in line or "turbojpeg" in line:
            assert str(tmp_path) in line  # its own, not the system's
    assert importlib.metadata.version("ffcv") in path.name
