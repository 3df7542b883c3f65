"""Training and the check of a GPU on a machine that lacks most packages, tried out on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dbd_dist.bench import correctness, gpu_check
from dbd_dist.config import TrainConfig
from dbd_dist.fields import from_dict, to_dict
from dbd_dist.launch.local import run_local

ABSENT = ("ray", "ffcv", "tyro", "tqdm", "sklearn", "matplotlib")


def run_without(packages: tuple[str, ...], code: str) -> str:
    """What a program prints in a process where these packages cannot be imported."""
    head = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_without_ray_and_ffcv_is_the_run_with_them(smoke_config, tmp_path):
    config = from_dict(TrainConfig, to_dict(smoke_config))
    code = f"""
import json
from pathlib import Path
from dbd_dist.config import TrainConfig, from_dict
from dbd_dist.launch.local import run_local
config = from_dict(TrainConfig, json.loads({json.dumps(json.dumps(to_dict(config)))}))
print(json.dumps(run_local(config, storage=Path({str(tmp_path / "without")!r}), name="run", quiet=True)))
assert not any(sys.modules.get(name) for name in {ABSENT!r})
"""
    without = json.loads(run_without(ABSENT, code).splitlines()[-1])
    result = run_local(config, storage=tmp_path / "with", name="run", quiet=True)
    assert result is not None
    same = [name for name in result if name != "seconds"]
    assert {name: without[name] for name in same} == {name: result[name] for name in same}
    for name in ("model.safetensors", "features.npz"):
        assert (tmp_path / "without/run" / name).read_bytes() == (tmp_path / "with/run" / name).read_bytes()


@pytest.mark.slow
def test_without_numba_a_cpu_augments_as_other_devices_do():
    code = """
import torch
from dbd_dist.data import augment
images = torch.arange(4 * 3 * 16 * 16).view(4, 3, 16, 16).to(torch.uint8)
params = augment.draw(augment.simclr(), 4, height=16, width=16, generator=torch.Generator().manual_seed(0))
print(augment.apply(augment.simclr(), images, params).double().sum().item())
"""
    with_numba, without = (float(run_without(packages, code)) for packages in ((), ("numba",)))
    assert without == pytest.approx(with_numba, rel=1e-4)


def test_missing_packages_are_named():
    code = """
from dbd_dist.bench.gpu_check import main
code = main(["--out", "/nowhere", "--device", "cpu"])
print(code)
"""
    assert run_without(("pyarrow",), code).strip() == "2"


def test_checks_find_a_difference(monkeypatch):
    cpu = torch.device("cpu")
    assert all(check.passed for check in correctness.losses(cpu))
    original, calls = correctness.nt_xent, []

    def wrong_on_the_device(first, second, temperature, world):
        calls.append(temperature)  # the CPU comes first
        return original(first, second, temperature * (1.0 if len(calls) == 1 else 1.01), world)

    monkeypatch.setattr(correctness, "nt_xent", wrong_on_the_device)
    assert {check.name for check in correctness.losses(cpu) if not check.passed} == {
        "loss, NT-Xent",
        "gradient, NT-Xent",
    }


def check(out: Path, *more: str) -> int:
    return gpu_check.main(["--out", str(out), "--device", "cpu", "--quick", *more])


def test_nothing_is_begun_without_time_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    assert check(tmp_path, "--parts", "correctness", "--budget-s", "0") == 3
    held = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not held.get("correctness")
    assert {"host", "versions", "commit", "seed"} <= held["about"].keys()
    failed = correctness.Check(name="planted", error=2.0, allowed=1.0, of="x")
    answers = {"losses": [failed], "stages": AttributeError("planted error")}

    def planted(group: str, device: torch.device) -> list[correctness.Check]:
        answer = answers.get(group, [])
        if isinstance(answer, AttributeError):
            raise answer
        return answer

    monkeypatch.setattr(correctness, "checks", planted)
    capsys.readouterr()
    assert check(tmp_path, "--parts", "correctness") == 1
    message = capsys.readouterr().err
    assert "failed: planted\n" in message
    assert "failed: correctness: stages\n" in message
    held = json.loads((tmp_path / "gpu_check.json").read_text())["correctness"]
    assert held["losses"][0]["passed"] is False
    assert "planted error" in held["stages"]["error"]
    assert held["chunks"] == []  # what came after was still run
    answers.clear()
    monkeypatch.setattr(correctness, "checks", lambda group, device: [] if group == "stages" else pytest.fail(group))
    assert check(tmp_path, "--parts", "correctness") == 1  # only what ended with an error is run again
    assert json.loads((tmp_path / "gpu_check.json").read_text())["correctness"]["stages"] == []


def write_parquet(root: Path) -> Path:
    """Ten classes of noise in the Hugging Face layout."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draws = np.random.default_rng(0)
    root.mkdir()
    for split, each in (("train", 24), ("test", 5)):
        rows, labels = [], []
        for label in range(10):
            for _ in range(each):
                file = io.BytesIO()
                Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
                rows.append({"bytes": file.getvalue(), "path": None})
                labels.append(label)
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
        pq.write_table(table, root / f"{split}.parquet")
    return root


@pytest.mark.slow
def test_recipes_stop_when_time_is_up_and_go_on(tmp_path, monkeypatch):
    images = write_parquet(tmp_path / "images")
    monkeypatch.setattr(gpu_check, "RECIPES", ("cifar10_badnets",))
    flags = ("--parts", "recipe", "--images", str(images), "--work", str(tmp_path / "work"), "--scale", "0.005")
    # enough to begin with, and spent at the end of the first epoch
    assert check(tmp_path / "out", *flags, "--budget-s", "31") in (0, 3)
    assert check(tmp_path / "out", *flags, "--budget-s", "600") == 0
    found = json.loads((tmp_path / "out" / "gpu_check.json").read_text())["recipe"]
    results = {value["result"]["method"]: value["result"] for value in found.values()}
    assert list(results) == ["none", "dbd", "dbd-robust"]
    assert results["dbd-robust"]["reused_stages"][:2] == ["simclr", "warmup"]  # of dbd's run
    assert all(0 <= value["result"]["clean_acc"] <= 1 for value in found.values())
