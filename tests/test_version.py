"""Numbers that are written in several places are the same everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import dbd_dist

ROOT = Path(__file__).resolve().parents[1]


def test_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dbd_dist.__version__
    assert f"\nversion: {dbd_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == dbd_dist.__version__


def test_version_of_ruff():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    hooks = re.findall(r"ruff==([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert pinned is not None
    assert hooks == [pinned[1], pinned[1]]
