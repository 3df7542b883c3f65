"""docs/results.md is what its JSON files give, and the README's table is one of its tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "results"


def test_page_is_current():
    assert (ROOT / "docs" / "results.md").read_text() == results.render(FOLDER), (
        "run python -m tests.benchmarks.results"
    )


def test_readme_has_its_tables():
    text = (ROOT / "README.md").read_text()
    assert results.with_tables(text, results.Page(FOLDER).readme()) == text, "run python -m tests.benchmarks.results"


def test_a_page_gets_its_tables_between_its_comments():
    text = "a\n<!-- x -->\n\nold\n\n<!-- end -->\nb <!-- end -->\n"
    assert results.with_tables(text, {"x": "new"}) == "a\n<!-- x -->\n\nnew\n\n<!-- end -->\nb <!-- end -->\n"
    with pytest.raises(ValueError, match="no place for the table 'y'"):
        results.with_tables(text, {"y": "new"})


def test_cells_against_numbers_worked_out_by_hand():
    runs = [
        {"asr": asr, "seed": seed, "kept_poisoned": k, "poisoned": 72}
        for seed, (asr, k) in enumerate([(0.9, 2), (0.8, 5)])
    ]
    assert results.percent(runs, "asr") == "85.00 ± 7.07"  # deviations of 5 points: sqrt((25 + 25) / 1)
    assert results.percent(runs[:1], "asr") == "90.00"
    assert results.percent(runs, "clean_acc") == ""
    assert results.percent([{"asr": 1.0}, {"asr": 0.0}], "asr") == "100.0, 0.0"
    assert results.kept(runs[::-1]) == "2, 5 of 72"


def test_a_new_file_is_shown_and_a_changed_number_changes_the_page(tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "results"))
    before = results.render(folder)
    rows = [
        {"method": method, "attack": "badnets", "clean_acc": 0.91, "asr": asr, "seconds": {"simclr": 12.5},
         "scale": 0.05, "hardware": "a GPU", "commit": "abc123"}
        for method, asr in (("none", 1.0), ("dbd", 0.0125))
    ]  # fmt: skip
    (folder / "gpu_new.json").write_text(json.dumps({"command": "make gpu-check", "rows": rows}))
    with_gpu = results.render(folder)
    assert "### gpu_new" in with_gpu
    assert "| dbd | 1.25 % |" in with_gpu
    assert "All rows: attack badnets; clean_acc 91.00 %; seconds simclr 12.5; scale 0.0500; hardware a GPU" in with_gpu
    assert with_gpu.count("gpu_new.json") == 2  # once, as a link
    changed = (folder / "demo.json").read_text().replace('"clean_acc": 0.9888579387186629', '"clean_acc": 0.5')
    (folder / "demo.json").write_text(changed)
    assert results.render(folder) != with_gpu != before


def test_a_table_of_reproduce_is_a_section(tmp_path):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "results"))
    (folder / "mine" / "results").mkdir(parents=True)
    about = {
        "table": "main", "title": "My own table", "preset": "demo", "holdout_clean": None, "detects": False,
        "command": "dbd reproduce main --seeds 0", "cases": [{"key": "badnets", "name": "badnets", "title": "BadNets",
        "own": False}], "methods": [{"key": "dbd", "name": "dbd"}], "seeds": [0],
    }  # fmt: skip
    (folder / "mine" / "table.json").write_text(json.dumps(about))
    result = {"method": "dbd", "seed": 0, "clean_acc": 0.9123, "asr": 0.0125, "seconds": {"a": 5.0}, "commands": ["c"]}
    (folder / "mine" / "results" / "badnets_dbd_s0.json").write_text(json.dumps(result))
    text = results.render(folder)
    assert "## My own table" in text
    assert "| BadNets | DBD | 1 | 91.23 | 1.25 | 92.50 / 0.88 |" in text
    assert "`dbd reproduce main --seeds 0`" in text


def test_command(tmp_path, capsys):
    folder = Path(shutil.copytree(FOLDER, tmp_path / "results"))
    assert results.main([str(folder), "--check"]) == 1
    assert results.main([str(folder)]) == 0
    assert results.main([str(folder), "--check"]) == 0
    assert "is current" in capsys.readouterr().out
