"""Everything that needs a GPU, in one resumable run: correctness against the CPU, benchmarks, then the recipe.

    python -m dbd_dist.bench.gpu_check --out FOLDER [--images FOLDER] [--work FOLDER] [--budget-s 1500] [--scale 1.0]

For a host with PyTorch that need have neither network, Ray, FFCV nor tyro. --images names a folder of train.parquet and
test.parquet (Hugging Face layout, CIFAR-10); the recipe is run on it, under BadNets and Blended, without defence, with
DBD and with dbd-robust. FOLDER/gpu_check.json is written anew after every piece, with hardware, versions, commit and
seed; pieces that are in it are not run again, and recipes resume from the checkpoints in --work. When the budget is
spent it stops within about a second of training, with a checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

NEEDED = ("torch", "torchvision", "numpy", "PIL", "pyarrow", "numba", "scipy", "safetensors", "tensorboard")
BENCHES = ("augmentation", "simclr", "mixmatch", "split", "memory", "loader", "epoch")
RECIPES = ("cifar10_badnets", "cifar10_blended")
METHODS = ("none", "dbd", "dbd-robust")
"""In this order: the last two share pretraining and warm-up, so that they differ in the fine-tuning."""
CHECKPOINT_S = 30.0
"""Between two checkpoints of a recipe; one is written too when the budget is spent."""


def check_imports() -> None:
    """Say at once what is missing; stand in for tyro, which only annotates command lines here.

    Raises:
        UserError: packages that nothing can stand in for.
    """

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"packages are missing: {', '.join(missing)}", where="gpu_check", hint="install them with pip")
    if sys.modules.get("tyro") is None and importlib.util.find_spec("tyro") is None:
        stand_in = types.ModuleType("tyro")
        nothing = lambda *_, **__: None  # noqa: E731
        stand_in.conf = types.SimpleNamespace(subcommand=nothing, arg=nothing)  # type: ignore[attr-defined]
        sys.modules["tyro"] = stand_in


class OutOfTime(Exception):
    """The budget is spent."""


class Record:
    """The JSON file that everything goes into."""

    def __init__(self, path: Path, until: float):
        self._path, self._until = path, until
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def piece(self, part: str, name: str, run: Callable[[], Any], *, enough_s: float = 0.0) -> None:
        """Run one piece where it is not there yet, and keep what it returns.

        Raises:
            OutOfTime: less than `enough_s` seconds are left.
        """
        held = self.found.setdefault(part, {})
        if name in held and not (isinstance(held[name], dict) and held[name].keys() & {"unfinished", "error"}):
            return
        if time.monotonic() + enough_s > self._until:
            raise OutOfTime
        start = time.monotonic()
        print(f"{part}: {name} ...", file=sys.stderr, flush=True)
        try:
            held[name] = run()
        except OutOfTime:
            raise
        except Exception:  # of any library: time on such a machine is short, and the other pieces are to be had
            held[name] = {"error": traceback.format_exc()}
            print(held[name]["error"], file=sys.stderr, flush=True)
        self.found.setdefault("seconds", {})[f"{part}/{name}"] = round(time.monotonic() - start, 1)
        self.write()

    def failures(self) -> list[str]:
        """Checks that found a difference, and pieces that ended with an error."""
        found = [
            f"{part}: {name}"
            for part in ("correctness", "bench", "recipe")
            for name, held in self.found.get(part, {}).items()
            if isinstance(held, dict) and "error" in held
        ]
        for held in self.found.get("correctness", {}).values():
            found += [check["name"] for check in held if isinstance(check, dict) and not check["passed"]]
        return found

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(aside, self._path)


def recipe(name: str, method: str, arguments: argparse.Namespace, until: float) -> dict[str, Any]:
    """One run of a preset, as far as the budget goes: its result, or the last figures with "unfinished"."""
    from data_prep.pipeline import prepare
    from data_prep.sources import Parquet
    from dbd_dist.distributed.world import World
    from dbd_dist.launch.local import prepare_folder
    from dbd_dist.presets import preset
    from dbd_dist.runtime import runner
    from dbd_dist.runtime.stopping import Stopped, StopRequest

    chosen = preset(name)
    source = Parquet(root=arguments.images)
    if arguments.quick:
        source = replace(source, train_per_class=24, test_per_class=5)
    dataset = prepare(
        replace(chosen.prepare, source=source, seed=arguments.seed, datasets=arguments.work / "datasets"),
        progress=False,
    )
    config = shortened(chosen, arguments).config(method)
    if arguments.quick and hasattr(config.method, "uat"):  # of one method, so that presets have no settings of it
        config = replace(config, method=replace(config.method, uat=replace(config.method.uat, epochs=1, batch=12)))
    # checkpoints of some 100 MB: an epoch of a few seconds would wait for them
    compute = replace(
        config.compute, checkpoint_s=CHECKPOINT_S, compile=arguments.compile, cuda_graphs=arguments.cuda_graphs
    )
    config = replace(config, seed=arguments.seed, data=dataset.folder.resolve(), compute=compute)
    run = f"{name}-{method}-s{arguments.seed}-x{arguments.scale:g}" + "-quick" * arguments.quick
    folder, dataset, stages = prepare_folder(config, arguments.work, run)
    world = World.join(arguments.device)
    folder.claim(config, dataset)
    about = {"config": config.to_dict(), "scale": arguments.scale}
    request = StopRequest(folder.stop)
    clock = threading.Timer(max(until - time.monotonic(), 0), request.set, ["SIGTERM"])
    clock.daemon = True
    clock.start()
    try:
        return {"result": runner.run(config, dataset, folder, stages, world, request=request), **about}
    except Stopped:  # with a checkpoint
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        return {"unfinished": True, "last": json.loads(lines[-1]) if lines else None, **about}
    finally:
        clock.cancel()


def shortened(chosen: Any, arguments: argparse.Namespace) -> Any:
    """A preset with its epochs scaled, schedules along with them; tiny where that is asked for."""
    stages = {stage.name: stage for stage in chosen.stages}

    def scaled(epochs: int) -> int:
        return max(1, round(epochs * arguments.scale))

    milestones = tuple(sorted({scaled(m) for m in stages["supervised"].milestones}))
    changed = chosen.change(
        simclr={"epochs": scaled(stages["simclr"].epochs)},
        mixmatch={"epochs": scaled(stages["mixmatch"].epochs)},
        supervised={"epochs": scaled(stages["supervised"].epochs), "milestones": milestones},
    )
    changed = replace(changed, evaluate_every=max(1, scaled(10)))
    if not arguments.quick:
        return changed
    from dbd_dist.presets import preset

    tiny = changed.change(
        simclr={"batch": 60},
        warmup={"epochs": 1, "batch": 60},
        mixmatch={"steps": 2, "batch": 12},
        supervised={"batch": 60},
    )
    return replace(tiny, model=preset("smoke").model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left; 0 when all is done and right, 1 when a check failed, 3 when the budget ended it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json")
    parser.add_argument("--images", type=Path, help="folder of train.parquet and test.parquet; without it no recipe")
    parser.add_argument("--work", type=Path, help="folder for data sets and runs; without it a temporary one")
    parser.add_argument("--budget-s", type=float, default=1500.0, help="seconds after which nothing new is begun")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the epochs of the recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=["correctness", "bench", "recipe"],
                        default=["correctness", "bench", "recipe"])  # fmt: skip
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the recipes")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="of the recipes")
    parser.add_argument("--cuda-graphs", choices=["auto", "on", "off"], default="auto", help="of the recipes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the command out")
    parser.add_argument("--quick", action="store_true", help="tiny networks and data, to try the command out")
    arguments = parser.parse_args(argv)

    until = time.monotonic() + arguments.budget_s
    try:
        check_imports()
        with tempfile.TemporaryDirectory(prefix="dbd-gpu-check-") as scratch:
            arguments.work = (arguments.work or Path(scratch) / "work").resolve()
            record = Record(arguments.out / "gpu_check.json", until)
            try:
                everything(arguments, record, Path(scratch), until)
            except OutOfTime:
                print(f"the budget of {arguments.budget_s:g} s is spent; the same command resumes", file=sys.stderr)
                return 3
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = record.failures()
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def checked(group: str, device: Any) -> list[dict[str, Any]]:
    """One group of checks, as JSON."""
    from dbd_dist.bench import correctness

    return [asdict(check) | {"passed": check.passed} for check in correctness.checks(group, device)]


def everything(arguments: argparse.Namespace, record: Record, scratch: Path, until: float) -> None:
    """Correctness, benchmarks, recipes, in this order."""
    import torch

    from dbd_dist.bench import correctness
    from dbd_dist.bench.images import prepare_synthetic
    from dbd_dist.bench.row import Row, Setup, cells
    from dbd_dist.bench.run import describe, run
    from dbd_dist.distributed.world import check_device

    def show(row: Row) -> None:
        print("| " + " | ".join(cells(row)) + " |", flush=True)

    check_device(arguments.device)
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    train = 100 if arguments.quick else 20000
    dataset: Any = None  # for the benchmarks alone: 20,000 files take a while
    if "bench" in arguments.parts:
        dataset = prepare_synthetic(scratch, train=train, test=train // 5, px=32)
    setup = Setup(
        dataset=dataset, scratch=scratch, device=device, repeats=1 if arguments.quick else arguments.repeats,
        quick=arguments.quick,
    )  # fmt: skip
    record.found["about"] = {**describe(setup, ["gpu_check", *sys.argv[1:]]), "seed": arguments.seed}
    record.write()
    if "correctness" in arguments.parts:
        for group in correctness.groups(device):
            record.piece("correctness", group, lambda group=group: checked(group, device))
    if "bench" in arguments.parts:
        for name in BENCHES:
            record.piece("bench", name, lambda name=name: [row.as_json() for row in run([name], setup, show)])
    if "recipe" in arguments.parts and arguments.images is not None:
        for name in arguments.recipes:
            for method in arguments.methods:
                label = f"{name}, {method}, scale {arguments.scale:g}, seed {arguments.seed}"
                record.piece("recipe", label, lambda n=name, m=method: recipe(n, m, arguments, until), enough_s=30)
                if record.found["recipe"][label].get("unfinished"):
                    raise OutOfTime


if __name__ == "__main__":
    sys.exit(main())
