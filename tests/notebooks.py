"""The notebooks of docs/examples from their scripts: `python -m tests.notebooks`.

A script starts with a docstring; `# %%` starts a cell, and text after it is a heading of that cell.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def notebook(source: str) -> dict[str, Any]:
    """A script as a notebook without outputs."""
    cells: list[dict[str, Any]] = []

    def add(kind: str, text: str) -> None:
        more = {"execution_count": None, "outputs": []} if kind == "code" else {}
        lines = text.splitlines(keepends=True)
        cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, "source": lines, **more})

    add("markdown", ast.get_docstring(ast.parse(source)) or "")
    for part in source.split("# %%")[1:]:
        heading, _, code = part.partition("\n")
        if heading.strip():
            add("markdown", heading.strip()[0].upper() + heading.strip()[1:])
        add("code", code.strip("\n"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.py")):
        path.with_suffix(".ipynb").write_text(json.dumps(notebook(path.read_text()), indent=1) + "\n")
