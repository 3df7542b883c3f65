"""Figures on disk: which there are, that they are what they say, and that grey print keeps them apart."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from dbd_dist.cli import main
from dbd_dist.reporting import pictures, plates

ALL = {"tsne", "losses", "detection", "epochs", "attacks", "cost"}


@pytest.mark.slow
def test_all_figures_of_two_methods(make_run, poisoned, tmp_path, capsys):
    runs = [make_run(poisoned, method="none", asr=1.0), make_run(poisoned), make_run(poisoned, seed=1)]
    out = tmp_path / "figures"
    assert main(["report", *map(str, runs), "--figures", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {f"{name}.{suffix}" for name in ALL for suffix in ("png", "svg")}
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        assert grey.min() < 64, path  # something dark is drawn
        assert grey.max() == 255
    text = (out / "epochs.svg").read_text()
    assert "attack success (ASR)" in text  # text stays text
    assert "as PNG and SVG" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_runs_give_the_same_figures(make_run, poisoned, tmp_path):
    runs = [make_run(poisoned, method="none", asr=1.0), make_run(poisoned)]
    first, _ = pictures.write_figures(runs, tmp_path / "a")
    second, _ = pictures.write_figures(runs, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_what_is_missing_is_said(make_run, untrusted, tmp_path):
    paths, notes = pictures.write_figures([make_run(untrusted, asr=None)], tmp_path / "f")
    assert {path.stem for path in paths} == {"losses", "epochs", "cost"}
    assert any("no tsne" in note and "not known which samples are poisoned" in note for note in notes)
    assert any("no detection" in note for note in notes)


def test_losses_under_both_kinds_of_cross_entropy(make_run, poisoned, tmp_path):
    folders = [make_run(poisoned), make_run(poisoned, name="ce", method="ssl-ce")]
    for folder, loss in zip(folders, ("sce", "ce")):
        description = json.loads((folder / "run.json").read_text())
        description["config"]["warmup"] = {"loss": loss}
        (folder / "run.json").write_text(json.dumps(description))
        (folder / "features.npz").unlink()  # t-SNE takes seconds
    pictures.write_figures(folders, tmp_path / "f")
    text = (tmp_path / "f" / "losses.svg").read_text()
    assert "symmetric cross-entropy (SCE), AUROC" in text
    assert ">cross-entropy (CE), AUROC" in text


def test_the_ranking_of_a_run_without_a_split_is_in_the_detection_figure(make_run, poisoned, tmp_path):
    folders = [make_run(poisoned), make_run(poisoned, name="ce", method="ssl-ce")]
    for folder in folders:
        (folder / "features.npz").unlink()
    pictures.write_figures(folders, tmp_path / "f")
    text = (tmp_path / "f" / "detection.svg").read_text()
    assert "ssl-ce, first split" in text
    assert "ssl-ce, last split" not in text


def test_a_method_that_changes_images_has_no_curve_of_the_model_without_that(make_run, poisoned, tmp_path):
    folders = [make_run(poisoned, method="none", asr=1.0), make_run(poisoned, method="shrinkpad", asr=0.02)]
    for folder in folders:
        (folder / "features.npz").unlink()
    _, notes = pictures.write_figures(folders, tmp_path / "f")
    text = (tmp_path / "f" / "epochs.svg").read_text()
    assert "No defence" in text
    assert "shrinkpad" not in text
    assert any("shrinkpad is not in epochs" in note for note in notes)


def test_lines_and_fillings_differ_without_colour():
    looks = [(look["marker"], look["fillstyle"]) for look in plates._LOOKS]
    dashes = [(look["marker"], str(look["linestyle"])) for look in plates._LOOKS]
    assert len(set(looks)) == len(set(dashes)) == len(plates._LOOKS)
    for colour, hatch in plates._FILLS:
        near = [grey(other) for other, same in plates._FILLS if same == hatch and other != colour]
        assert all(abs(grey(colour) - other) > 0.15 for other in near), (colour, hatch)
    assert len(set(plates._FILLS)) == len(plates._FILLS)


def grey(colour: str) -> float:
    """Luminance in 0-1 (Rec. 601)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_no_look_is_used_twice_in_a_figure_of_the_main_table():
    from dbd_dist.presets import preset
    from dbd_dist.reproduce.table import DEFENCES

    stages = {stage.name for name in DEFENCES for stage in preset("demo").config(name).method.trained()}
    assert len(DEFENCES) <= len(plates._LOOKS)
    assert len(stages) <= len(plates._FILLS)


def test_out_and_figures_exclude_each_other(make_run, poisoned, tmp_path, capsys):
    assert main(["report", str(make_run(poisoned)), "--figures", str(tmp_path / "f"), "--out", "x.html"]) == 2
    assert "--figures" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(make_run, poisoned, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        pictures.write_figures([make_run(poisoned)], tmp_path / "file" / "f")
