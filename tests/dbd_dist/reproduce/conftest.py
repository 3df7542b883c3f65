"""Results of a table, written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dbd_dist.reproduce.collect import ABOUT, RESULTS


@pytest.fixture
def write_table(tmp_path) -> Callable[..., Path]:
    """Write a folder as `dbd reproduce` leaves it: results by (case, method, seed), and what differs from the rest."""

    def write(results: dict[tuple[str, str, int], dict[str, Any]], **about: Any) -> Path:
        folder = tmp_path / "table"
        (folder / RESULTS).mkdir(parents=True)
        cases, methods, seeds = ([*dict.fromkeys(key[i] for key in results)] for i in range(3))
        content = {
            "table": "main", "title": "A title", "preset": "smoke", "holdout_clean": 0.05,
            "command": "dbd reproduce main", "detects": False,
            "cases": [{"key": name, "name": name, "title": name.title(), "own": False} for name in cases],
            "methods": [{"key": name, "name": name} for name in methods], "seeds": seeds,
        }  # fmt: skip
        (folder / ABOUT).write_text(json.dumps(content | about))
        for (case, method, seed), values in results.items():
            result = {
                "method": method, "titles": {"none": "No defence", "dbd": "DBD", "nad": "NAD"}, "seed": seed,
                "defends": method != "none", "needs_clean": method == "nad", "clean_acc": 0.5, "asr": 0.5,
                "kept_poisoned": None, "poisoned": 40, "seconds": {"a": 10.0, "b": 20.0}, "device": "a CPU, 2 cores",
                "world_size": 1, "precision": "fp32", "commit": "abc123",
                "commands": [f"dbd prepare {case}", f"dbd train {case} {method} {seed}"],
            }  # fmt: skip
            (folder / RESULTS / f"{case}_{method}_s{seed}.json").write_text(json.dumps(result | values))
        return folder

    return write
