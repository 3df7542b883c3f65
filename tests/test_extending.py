"""docs/extending.md is a package with one part of each kind: built as a wheel, installed elsewhere, and used."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "attacks": "stripe",
    "crafts": "one-step",
    "sources": "ramps",
    "stages": "rotation",
    "methods": "dbd-rotation",
    "backbones": "plain_cnn",
    "spaces": "ratio",
    "trackers": "lines",
}


def write_package(folder: Path) -> None:
    """The blocks of the page, each in the file that its first line names."""
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", page, re.S)
    assert len(blocks) == 1 + len(PARTS)  # pyproject.toml, and one file a part
    for name, text in blocks:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "dbd_dist_example" / "__init__.py").touch()


class Installed:
    """A virtual environment of its own that has the packages of this one, and the wheel."""

    def __init__(self, folder: Path):
        self.folder = folder
        venv.create(folder / "env", with_pip=False)
        self.python = folder / "env" / "bin" / "python"
        self.site = next((folder / "env").glob("lib/python*/site-packages"))
        others = [path for path in {*site.getsitepackages(), *sys.path} if "site-packages" in path]
        (self.site / "others.pth").write_text("\n".join([str(ROOT), *others]) + "\n")

    def run(self, *argv: str) -> str:
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.python), *argv], capture_output=True, text=True, cwd=self.folder, env=environ, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
        return done.stdout + done.stderr

    def dbd(self, *commands: Sequence[str], code: int = 0) -> list[str]:
        """What each command printed, one after the other in one process: starting one takes longer than most of them.
        The first ends with `code`, the others with 0."""
        program = """
import contextlib, io, json, sys
from dbd_dist.cli import main
said, (wanted, *commands) = [], json.loads(sys.argv[1])
for argv in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            ended = main(argv)
        except SystemExit as error:
            ended = error.code or 0
    if ended != wanted:
        sys.exit(f"{argv}: {ended}: {out.getvalue()}")
    wanted = 0
    said.append(out.getvalue())
print(json.dumps(said))
"""
        return json.loads(self.run("-c", program, json.dumps([code, *commands])).splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    folder = tmp_path_factory.mktemp("extending")
    write_package(folder / "package")
    made = Installed(folder)
    wheels = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*wheels, str(folder / "package")], check=True)
    (wheel,) = folder.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(made.site)]
    subprocess.run([*pip, str(wheel)], check=True)
    return made


@pytest.mark.slow
def test_every_part_is_registered_by_its_entry_point(installed):
    code = """
import json
from data_prep.attacks import ATTACKS
from data_prep.sources import SOURCES
from dbd_dist.craft import CRAFTS
from dbd_dist.methods import METHODS
from dbd_dist.models import BACKBONES
from dbd_dist.stages import STAGES
from dbd_dist.tracking import TRACKERS
from tune_spaces.spaces import SPACES
registries = (ATTACKS, CRAFTS, SOURCES, STAGES, METHODS, BACKBONES, SPACES, TRACKERS)
print(json.dumps({r.kind: [list(r), [str(e) for e in r.refused.values()]] for r in registries}))
"""
    found = json.loads(installed.run("-c", code))
    assert found.keys() == PARTS.keys()
    for kind, name in PARTS.items():
        assert name in found[kind][0]
        assert found[kind][1] == []


def rows_of(folder: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


@pytest.mark.slow
def test_every_part_works_through_the_command(installed):
    helps = {
        ("prepare", "ramps", "stripe"): ("--column", "Where the stripe is", "--side-px"),
        ("craft", "one-step"): ("--eps", "Length of the step in grey levels"),
        ("train", "smoke", "--method", "dbd-rotation"): ("--rotation.lr", "--mixmatch.lambda-u"),
        ("tune",): ("ratio",),
    }
    for (command, words), said in zip(
        helps.items(), installed.dbd(*[(*command, "--help") for command in helps]), strict=True
    ):
        shown = " ".join(said.replace("│", " ").split())
        assert all(word in shown for word in words), shown
        assert command[0] != "train" or "--simclr" not in shown

    small = ("--train-per-class", "60", "--workers", "1")
    local = ("--launcher", "local", "--compute.threads", "1", "--model.backbone", "plain_cnn")
    run = ("train", "smoke", "--method", "dbd-rotation", "--data", "poisoned", "--warmup.batch", "60")
    crafting = ("--launcher", "local", "--device", "cpu", "--preset", "smoke", "--rate", "0.05")
    prepared, _, first, second, *_, doctor = installed.dbd(
        ("prepare", "ramps", "stripe", "--column", "3", "--rate", "0.1", *small, "--out", "poisoned"),
        ("prepare", "ramps", "clean", *small, "--out", "clean"),
        (*run, "--stop-after", "warmup", *local, "--name", "first"),
        (*run, *local, "--name", "second", "--log", "lines"),
        ("report", "runs/second", "--out", "report.html"),
        ("craft", "one-step", "--data", "clean", "--out", "artefact", *crafting),
        ("prepare", "ramps", "one-step", "--artefact", "artefact", "--rate", "0.05", *small, "--out", "crafted"),
        ("doctor", "crafted", "artefact"),
    )
    assert "240 training (24 poisoned for class 3, d) and 24 test images of 16 px, 4 classes" in prepared
    assert "stopped after warmup" in first
    assert "DBD, rotation" in second
    folder = installed.folder / "runs" / "second"
    lines = (folder / "lines.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(row["epoch"]) for row in rows_of(folder, "mixmatch")]
    result = json.loads((folder / "result.json").read_text())
    assert result["reused_stages"] == ["rotation", "warmup"]
    assert result["titles"]["rotation"] == "Rotation pretraining"
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["rotation", "warmup", "mixmatch"]
    assert "Rotation pretraining" in (installed.folder / "report.html").read_text()
    assert "one-step" in doctor


@pytest.mark.slow
def test_every_part_works_from_python(installed):
    code = """
from pathlib import Path
from data_prep import PrepareConfig
from data_prep.attacks import ATTACKS
from data_prep.sources import SOURCES
from dbd_dist import evaluate, open_run, prepare, report, train
source, attack = SOURCES["ramps"](train_per_class=60), ATTACKS["stripe"](column=1)
data = prepare(PrepareConfig(source=source, attack=attack, rate=0.1, out=Path("py"), workers=1), progress=False)
changes = {"compute.threads": 1, "warmup.batch": 60, "model.backbone": "plain_cnn"}
run = train("smoke", method="dbd-rotation", data=data.folder, storage="py-runs", settings=changes)
assert run.result["clean_acc"] == evaluate(run).clean_acc == open_run(run.folder).result["clean_acc"]
print(report([run]))
"""
    assert "DBD, rotation" in installed.run("-c", code)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "nowhere:Nothing",
            "does not import (ModuleNotFoundError: No module named 'nowhere'). Hint: repair",
        ),
        ("dbd_dist_example.ratio:RATIO", "is no method. Expected: a subclass or instance of dbd_dist.methods"),
        ("broken_plugin:NoTitle", "the method has no title. Expected: the fields name, title, stages"),
    ],
)
def test_a_plugin_that_does_not_fit_is_left_out(installed, target, message):
    module = installed.site / "broken_plugin.py"
    module.write_text("from dbd_dist.methods import Method\nclass NoTitle(Method):\n    name = 'broken'\n")
    about = installed.site / "broken_plugin-1.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[dbd_dist.methods]\nbroken = {target}\n")
    try:
        said, shown = installed.dbd(("train", "smoke", "--method", "broken"), ("train", "smoke", "--help"), code=2)
        assert f"broken-plugin: entry point broken = {target}: " in said
        assert message in said
        assert "note: left out broken-plugin" in said + shown  # once a process
        assert "dbd-rotation" in shown
    finally:
        for path in (*about.iterdir(), module):
            path.unlink()
        about.rmdir()


def test_a_name_that_is_taken_is_refused():
    from data_prep.errors import UserError
    from dbd_dist.methods import METHODS
    from dbd_dist.methods.dbd import DBD

    with pytest.raises(UserError, match="plugin: the method 'dbd' is there already"):
        METHODS.add("dbd", DBD, origin="plugin")
