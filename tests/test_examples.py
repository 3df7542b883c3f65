"""docs/examples: the scripts run, and the notebooks hold their code (`python -m tests.notebooks` writes them)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def run(name: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("DBD_STORAGE", "RAY_ADDRESS")}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_own_images(tmp_path):
    output = run("own_images", tmp_path)
    assert "20 of 400 images are poisoned" in output
    methods = {json.loads(path.read_text())["method"] for path in tmp_path.glob("runs/*/result.json")}
    assert methods == {"none", "dbd"}
    assert "| DBD |" in output
    assert "labels kept: 200 of them poisoned:" in output
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_own_defence(tmp_path):
    output = run("own_defence", tmp_path)
    assert "| ShrinkPad |" in output
    plain, padded = (
        json.loads((tmp_path / "runs" / f"smoke-{method}-s0" / "result.json").read_text())
        for method in ("none", "shrink-pad")
    )
    assert padded["titles"]["shrink-pad"] == "ShrinkPad"
    assert padded["defends"]
    assert padded["data_hash"] == plain["data_hash"]


def test_each_script_has_a_notebook():
    assert NAMES == ["own_defence", "own_images"]
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_holds_the_code_of_its_script(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert len(source.splitlines()) < 60
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["language_info"]["name"]) == (4, "python")
    first, *cells = notebook["cells"]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).strip() == ast.get_docstring(ast.parse(source))
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    joined = "\n".join("".join(cell["source"]) for cell in code)
    assert ast.dump(ast.parse(joined)) == ast.dump(ast.Module(ast.parse(source).body[1:], type_ignores=[]))
