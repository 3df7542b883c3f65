"""Golden values: what the commands make of the embedded digits, to the bit, so that no rewriting changes it unnoticed.

    python -m tests.golden.make [PART ...]             write the JSON files beside this one anew
    python -m tests.golden.make --check [PART ...]     make everything again and compare (`make golden`)

Parts: prepare (every attack under every setting), local (one process, and `dbd evaluate`), report (tables of the local
runs), torchrun (two ranks), craft (both artefacts, and the data sets that they poison), ray (two workers). Everything
goes through the `dbd` command and is read from the files that it leaves: nothing here knows the inside of a package.

Floats are equal to the last bit only on equal processors and versions of torch. Each file names those that it was made
with; elsewhere `differences` compares what does not depend on them. Files are written anew only where a change of the
results is meant.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODULE = "dbd_dist.cli"
"""The module behind the `dbd` command; torchrun starts modules."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
"""One thread a process, and a Ray of this machine's own."""

SEEDS = (0, 1)
METHODS = ("none", "dbd")
SETTINGS = ("paper", "released", "ten-percent")
CLEAN_LABEL = ("sig", "ctrl")
"""Attacks that the released setting does not have."""
TRAIN = ("--compute.device", "cpu", "--compute.precision", "fp32", "--compute.threads", "1")
"""What every run is given beside preset, method, seed and data."""

ATTACKS: dict[str, tuple[str, ...]] = {
    "badnets": ("badnets",),
    "badnets all-to-all": ("badnets", "--mapping", "all-to-all"),
    "blended": ("blended",),
    "wanet": ("wanet",),
    "sig": ("sig",),
    "adap-blend": ("adap-blend",),
    "adap-patch": ("adap-patch",),
    "ctrl": ("ctrl", "--window", "16", "--bands", "7", "15"),
}
"""Under every setting."""
OTHERS: dict[str, tuple[str, ...]] = {
    "clean": ("clean",),
    "clean, JPEG": ("clean", "--encoding", "jpeg"),
    "untrusted, some images": ("clean", "--untrusted", "--train-per-class", "20", "--test-per-class", "5"),
    "badnets, seed 1": ("badnets", "--seed", "1"),
    "badnets, another patch": ("badnets", "--pattern", "white", "--corner", "top-left", "--patch-px", "2"),
    "badnets, another size": ("badnets", "--image-px", "24", "--rate", "0.02", "--target", "7"),
    "badnets, JPEG": ("badnets", "--encoding", "jpeg", "--jpeg-quality", "80"),
    "blended all-to-all": ("blended", "--mapping", "all-to-all", "--alpha", "0.3"),
    "wanet, another field": ("wanet", "--grid", "2", "--strength", "4", "--noise-ratio", "0"),
    "sig, stronger": ("sig", "--delta", "40"),
}
"""The rest of the data sets, each once."""

ARTEFACTS: dict[str, tuple[str, ...]] = {
    # the whole class, so that what any setting chooses is among it
    "label-consistent": ("label-consistent", "--preset", "smoke", "--steps", "5", "--eps", "32", "--step", "8",
                         "--rate", "0.1015"),
    "label-consistent, ten-percent": ("label-consistent", "--surrogate", "{storage}/label-consistent/surrogate",
                                      "--start", "random", "--steps", "5", "--norm", "l2", "--eps", "300", "--step",
                                      "60", "--target", "0", "--rate", "0.05"),
    "adaptive": ("adaptive", "--preset", "smoke", "--steps", "5", "--optimise", "pattern-and-mask"),
    "adaptive, ten-percent": ("adaptive", "--backbone", "{storage}/adaptive/backbone", "--steps", "5", "--patch-px",
                              "5", "--distance", "cosine", "--target", "0", "--seed", "1"),
}  # fmt: skip
CRAFTED: dict[str, tuple[str, ...]] = {
    "label-consistent, paper": ("label-consistent", "--artefact", "{artefacts}/label-consistent"),
    "label-consistent, larger": ("label-consistent", "--artefact", "{artefacts}/label-consistent", "--patch-px", "4"),
    "label-consistent, ten-percent": ("label-consistent", "--artefact", "{artefacts}/label-consistent, ten-percent",
                                      "--protocol", "ten-percent"),
    "adaptive, paper": ("adaptive", "--artefact", "{artefacts}/adaptive"),
    "adaptive, released": ("adaptive", "--artefact", "{artefacts}/adaptive", "--protocol", "released"),
    "adaptive, ten-percent": ("adaptive", "--artefact", "{artefacts}/adaptive, ten-percent", "--protocol",
                              "ten-percent"),
}  # fmt: skip

FIELDS = (
    "name", "setting", "selection", "rate", "target", "seed", "counts", "poisoned", "covers", "encoding_psnr_db",
    "stealth", "content_hash", "data_hash",
)  # fmt: skip
"""Of a manifest."""
UNEQUAL_ROWS = ("time_s", "images_per_s")
UNEQUAL_RESULTS = ("seconds", "device", "versions", "commit", "config_hash")
"""What differs between equal runs, or with how a configuration is written down."""


# -- commands


def dbd(*argv: str | Path) -> str:
    """Run a command in this process; gives what it printed.

    Raises:
        RuntimeError: it failed.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = importlib.import_module(MODULE).main([str(a) for a in argv])
    if code:
        raise RuntimeError(f"exit code {code}: dbd {' '.join(map(str, argv))}")
    return printed.getvalue()


def dbd_apart(*argv: str | Path, launcher: Sequence[str] = (), one_core: bool = False) -> None:
    """Run a command of this checkout in a process of its own.

    Args:
        argv: its arguments; paths are absolute.
        launcher: what stands between Python and the module.
        one_core: for what has no flag for its threads, and takes one for each core.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *launcher, "-m", MODULE, *map(str, argv)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=_to_one_core if one_core else None,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stdout[-4000:]}")


def _to_one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# -- hashes of what is in files, whatever their containers


def arrays_sha256(arrays: Mapping[str, Any]) -> str:
    """Over names, types, shapes and bytes of numpy arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def weights_sha256(path: Path) -> str:
    """Over all tensors of a .safetensors file, by name."""
    from safetensors.numpy import load_file

    return arrays_sha256(load_file(path))


def npz_sha256(path: Path) -> str:
    """Over all arrays of a .npz file, by name."""
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return arrays_sha256(dict(arrays))


def table_sha256(path: Path) -> str:
    """Over names and values of a .parquet file's columns."""
    from pyarrow import parquet

    text = json.dumps(parquet.read_table(path).to_pydict(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# -- what is kept of each kind of folder


def data_set(folder: Path) -> dict[str, Any]:
    """Of a dataset folder: hashes of its samples, and what its manifest says of the poison."""
    manifest = _read(folder / "manifest.json")
    tables = {path.stem: table_sha256(path) for path in sorted(folder.glob("*.parquet"))}
    manifest["setting"] = manifest.pop("protocol")  # its name before version 3 of the format
    return {**{field: manifest[field] for field in FIELDS}, "tables": tables}


def run(folder: Path) -> dict[str, Any]:
    """Of a run folder: rows and result without times, hashes of weights and arrays."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = _read(folder / "result.json")
    exported = {path.stem: weights_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    arrays = {"features": npz_sha256(folder / "features.npz")}
    if (folder / "split.parquet").exists():
        arrays["split"] = table_sha256(folder / "split.parquet")
    return {
        "rows": [{k: v for k, v in row.items() if k not in UNEQUAL_ROWS} for row in rows],
        "result": {k: v for k, v in result.items() if k not in UNEQUAL_RESULTS},
        "weights": exported,
        "arrays": arrays,
    }


def artefact(folder: Path) -> dict[str, Any]:
    """Of an artefact's folder."""
    description = _read(folder / "artefact.json")
    kept = {k: description[k] for k in ("kind", "image_px", "target", "fingerprint", "evidence")}
    return {**kept, "arrays": npz_sha256(folder / "artefact.npz")}


def table(markdown: str) -> list[str]:
    """The lines of a report's table, without the column of times and the line of the hardware."""
    lines = [line for line in markdown.splitlines() if line and not line.startswith("Hardware:")]
    head = re.split(r"(?<!\\)\|", lines[0])
    at = next(i for i, title in enumerate(head) if title.strip() == "time")
    kept = []
    for line in lines:
        cells = re.split(r"(?<!\\)\|", line)
        kept.append("|".join(cells[:at] + cells[at + 1 :]) if len(cells) == len(head) else line)
    return kept


# -- the parts


def poisoned_digits(work: Path, seed: int) -> Path:
    """The data set of a run: BadNets as the preset has it, poisoned with the run's seed."""
    folder = work / "datasets" / f"badnets-s{seed}"
    if not folder.exists():
        dbd("prepare", "digits", "badnets", "--seed", str(seed), "--out", folder)
    return folder


def make_prepare(work: Path) -> dict[str, Any]:
    """Data sets of every attack that needs no model."""
    asked = {
        f"{name}, {setting}": (*argv, "--protocol", setting)
        for name, argv in ATTACKS.items()
        for setting in SETTINGS
        if setting != "released" or name not in CLEAN_LABEL
    }
    made = {}
    for name, argv in (asked | OTHERS).items():
        folder = work / "prepare" / name
        dbd("prepare", "digits", *argv, "--out", folder)
        made[name] = data_set(folder)
    return made


def make_run(work: Path, launcher: str, method: str, seed: int) -> Path:
    """A run of the smoke preset, as one process, as two ranks of torchrun, or on two workers of Ray; gives its
    folder. Runs of a launcher share no stages with those of another."""
    storage, name = work / launcher, f"{method}-s{seed}"
    which = ("train", "smoke", "--method", method, "--seed", str(seed), "--data", poisoned_digits(work, seed))
    where = ("--storage", storage, "--name", name, "--compute.workers", "1" if launcher == "local" else "2")
    if launcher == "local":
        dbd(*which, *where, *TRAIN, "--launcher", "local")
    elif launcher == "torchrun":
        dbd_apart(*which, *where, *TRAIN, "--launcher", "local", launcher=TORCHRUN)
    else:
        dbd_apart(*which, *where, *TRAIN, "--launcher", "ray")
    return storage / name


def make_runs(
    work: Path, launcher: str, seeds: Sequence[int] = SEEDS, methods: Sequence[str] = METHODS
) -> dict[str, Any]:
    """Runs of both methods and seeds; of those of one process also what `dbd evaluate` measures."""
    made = {}
    for seed in seeds:
        for method in methods:
            folder = make_run(work, launcher, method, seed)
            made[folder.name] = run(folder)
            if launcher == "local":
                made[folder.name]["evaluate"] = json.loads(dbd("evaluate", folder))
    return made


def make_craft(work: Path) -> dict[str, Any]:
    """Artefacts, the networks that were trained for them, and the data sets that they poison."""
    clean, storage, artefacts = work / "datasets" / "clean", work / "craft", work / "artefacts"
    dbd("prepare", "digits", "clean", "--out", clean)
    made: dict[str, Any] = {"artefacts": {}, "networks": {}, "prepare": {}}
    for name, argv in ARTEFACTS.items():
        given = [part.format(storage=storage) for part in argv]
        where = ("--data", clean, "--out", artefacts / name, "--storage", storage)
        dbd_apart("craft", *given, *where, "--launcher", "local", "--device", "cpu", one_core=True)
        made["artefacts"][name] = artefact(artefacts / name)
    made["networks"] = {
        "surrogate": weights_sha256(storage / "label-consistent" / "surrogate" / "model.safetensors"),
        "backbone": weights_sha256(storage / "adaptive" / "backbone" / "backbone.safetensors"),
    }
    for name, argv in CRAFTED.items():
        folder = work / "prepare-crafted" / name
        dbd("prepare", "digits", *(part.format(artefacts=artefacts) for part in argv), "--out", folder)
        made["prepare"][name] = data_set(folder)
    return made


def make_report(work: Path, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """The Markdown table of the runs of the first seed, of the first two, ... (as far as there are `seeds`); the runs
    of one process are made before."""
    made = {}
    for count in range(1, len(seeds) + 1):
        folders = [work / "local" / f"{method}-s{seed}" for seed in seeds[:count] for method in METHODS]
        out = work / f"report-{count}.md"
        dbd("report", *folders, "--format", "md", "--out", out)
        made[" and ".join(f"seed {seed}" for seed in seeds[:count])] = table(out.read_text(encoding="utf-8"))
    return made


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "prepare": make_prepare,
    "local": functools.partial(make_runs, launcher="local"),
    "report": make_report,
    "torchrun": functools.partial(make_runs, launcher="torchrun"),
    "craft": make_craft,
    "ray": functools.partial(make_runs, launcher="ray"),
}
"""In this order: report needs what local leaves."""


# -- comparing


def machine() -> dict[str, Any]:
    """What floats depend on beyond the code: the processor and its instructions, torch, threads."""
    import torch

    about: dict[str, Any] = {"machine": platform.machine()}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        about |= {name: fields[name] for name in ("model name", "cpu family", "model") if name in fields}
        flags = " ".join(sorted(fields.get("flags", "").split()))
        about["flags sha256"] = hashlib.sha256(flags.encode()).hexdigest()[:16]
    return {
        **about,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads a process": int(ENVIRONMENT["OMP_NUM_THREADS"]),
    }


def golden(part: str) -> dict[str, Any]:
    """The file of a part: {"machine": ..., "values": ...}."""
    return _read(HERE / f"{part}.json")


def same_machine(part: str) -> bool:
    """Are floats of this machine those of the file, to the bit?"""
    return golden(part)["machine"] == machine()


LOSS_TOLERANCE = 0.02
"""Of the losses of a run's first stage, relative: other instructions round otherwise, and steps of training make more
of it with each epoch (measured: AVX2, and no vectors at all, against AVX-512: below 0.007; at the end of the last stage
0.13)."""
TOLERANCE = 1e-6
"""Of other floats that are compared on another machine."""


def portable(part: str, values: dict[str, Any]) -> dict[str, Any]:
    """What is the same on every machine: all that `dbd prepare` makes; of runs what they did and what they came to
    before rounding tells."""
    if part in ("craft", "report"):
        return {}
    if part == "prepare":
        return values
    kept = ("stage", "epoch", "epochs", "lr", "kept", "poisoned")
    fixed = (
        "method",
        "preset",
        "dataset",
        "data_hash",
        "attack",
        "seed",
        "kept",
        "poisoned",
        "train_size",
        "world_size",
    )
    made = {}
    for name, one in values.items():
        first = one["rows"][0]["stage"]
        rows = [
            {k: row[k] for k in (*kept, *(["loss"] if row["stage"] == first else [])) if k in row}
            for row in one["rows"]
        ]
        made[name] = {"rows": rows, "result": {k: one["result"][k] for k in fixed}, "exported": sorted(one["weights"])}
    return made


def differences(part: str, found: dict[str, Any]) -> list[str]:
    """Where values of a part, all or some of them, differ from the golden ones, in words; bit for bit on the machine of
    the file, else what does not depend on it."""
    values = golden(part)["values"]
    missing = [f"{part}: there is no golden value for {name}" for name in found if name not in values]
    wanted = {name: values[name] for name in found if name in values}
    # through JSON, as the golden values went
    found = {name: json.loads(json.dumps(found[name])) for name in wanted}
    if same_machine(part):
        return missing + list(_differing(wanted, found, part, exact=True))
    return missing + list(_differing(portable(part, wanted), portable(part, found), part, exact=False))


def _differing(wanted: Any, found: Any, where: str, *, exact: bool) -> list[str]:
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = list(dict.fromkeys([*wanted, *found]))
        absent = "absent"
        return [
            line
            for key in keys
            for line in _differing(wanted.get(key, absent), found.get(key, absent), f"{where}: {key}", exact=exact)
        ]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return [line for i, (a, b) in pairs for line in _differing(a, b, f"{where}[{i}]", exact=exact)]
    if not exact and isinstance(wanted, float) and isinstance(found, float):
        tolerance = LOSS_TOLERANCE if where.endswith(": loss") else TOLERANCE
        same = math.isclose(wanted, found, rel_tol=tolerance, abs_tol=1e-9)
    else:
        same = wanted == found and type(wanted) is type(found)
    return [] if same else [f"{where}: {found!r}, golden {wanted!r}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the parts; write them, or compare them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"default: {' '.join(PARTS)}")
    parser.add_argument("--check", action="store_true", help="compare with what is stored instead of writing it")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {min(unknown)}; there are {', '.join(PARTS)}")
    os.environ.update(ENVIRONMENT)
    os.environ.pop("DBD_STORAGE", None)
    wanted = set(arguments.parts or PARTS) | ({"local"} if "report" in arguments.parts else set())
    failed = 0
    with tempfile.TemporaryDirectory(prefix="dbd-golden-") as folder:
        work = Path(folder).resolve()
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        for part, make in PARTS.items():
            if part not in wanted:
                continue
            values = make(work)
            if arguments.check:
                problems = differences(part, values)
                how = "to the bit" if same_machine(part) else "as far as another machine allows"
                print(f"{part}: {f'{len(problems)} differences' if problems else f'as it was, {how}'}", flush=True)
                for problem in problems:
                    print(f"  {problem}")
                failed += bool(problems)
            else:
                text = json.dumps({"machine": machine(), "values": values}, indent=1)
                (HERE / f"{part}.json").write_text(text + "\n", encoding="utf-8")
                print(f"{part}: written", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
