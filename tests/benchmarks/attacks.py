"""Every attack without and with DBD, over seeds: the table of attacks in docs/results.md.

    python -m tests.benchmarks.attacks [--storage runs/attacks] [--seeds 0 1 2] [--attacks NAME ...]
                                       [--methods none dbd] [--preset demo] [--source digits] [--jobs 2] [--list]
                                       [-- FLAGS]

Data sets, artefacts and runs go below the storage; what is there already is not made again, so that the command can be
interrupted and repeated. Runs take one process and one thread each, so many at a time as --jobs says. FLAGS go to every
`dbd train`. The table is printed at the end, and by `dbd report STORAGE/*/*/* --format md` at any time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One row of the table: an attack and its settings."""

    name: str
    prepare: tuple[str, ...]
    """Arguments of `dbd prepare SOURCE`; {artefact} is the folder of the crafted one."""
    craft: tuple[str, ...] = ()
    """Arguments of `dbd craft`, where it is needed."""


DIGITS = {
    case.name: case
    for case in (
        Case("clean", ("clean",)),
        Case("badnets", ("badnets",)),
        Case("blended", ("blended",)),
        # the originals have 8 x 8 pixels: the default field, 4 x 4 vectors of a quarter of a pixel, is lost in them
        Case("wanet", ("wanet", "--grid", "2", "--strength", "4")),
        # the rate of WaNet's own paper: 10 % with the trigger, 20 % noise samples
        Case("wanet-10", ("wanet", "--grid", "2", "--strength", "4", "--rate", "0.1")),
        Case("wanet-no-noise", ("wanet", "--grid", "2", "--strength", "4", "--noise-ratio", "0")),
        Case(
            "label-consistent",
            ("label-consistent", "--artefact", "{artefact}", "--patch-px", "4"),
            ("label-consistent", "--eps", "32", "--step", "3.2"),
        ),
        Case("adaptive", ("adaptive", "--artefact", "{artefact}"), ("adaptive", "--optimise", "pattern-and-mask")),
        Case("sig", ("sig", "--delta", "40")),
        Case("adap-blend", ("adap-blend",)),
        Case("adap-patch", ("adap-patch",)),
        Case("badnets-all-to-all", ("badnets", "--mapping", "all-to-all")),
    )
}
"""What is run on the embedded digits."""


def dbd(*arguments: str, log: Path) -> None:
    """Run a command of the project on one thread; its output goes to a file.

    Raises:
        SystemExit: it failed; with the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dbd_dist.cli", *arguments]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environ, check=False).returncode
    if code:
        raise SystemExit(f"dbd {' '.join(arguments)}: exit code {code}\n{log.read_text()[-2000:]}")


def data_set(case: Case, seed: int, arguments: argparse.Namespace) -> Path:
    """The folder of a poisoned data set, made where it is not there."""
    root: Path = arguments.storage
    source = arguments.source.split()
    folder = root / "datasets" / f"{case.name}-s{seed}"
    log = root / "logs" / f"{case.name}-s{seed}.log"
    artefact = root / "artefacts" / f"{case.name}-s{seed}"
    if case.craft:
        clean = root / "datasets" / "clean"
        if not (clean / "manifest.json").exists():
            dbd("prepare", *source, "clean", "--out", str(clean), log=log)
        if not artefact.exists():
            where = ("--data", str(clean), "--out", str(artefact), "--storage", str(root / "craft"))
            dbd("craft", *case.craft, *where, "--preset", arguments.preset, "--seed", str(seed), "--launcher", "local",
                log=log)  # fmt: skip
    if not (folder / "manifest.json").exists():
        attack = [part.format(artefact=artefact) for part in case.prepare]
        dbd("prepare", *source, *attack, "--seed", str(seed), "--out", str(folder), log=log)
    return folder


def train(case: Case, seed: int, method: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Train one model; a run that is finished is left alone."""
    root: Path = arguments.storage
    where = ("--data", str(folder), "--storage", str(root), "--name", f"{case.name}/{method}/s{seed}")
    how = ("--launcher", "local", "--compute.threads", "1", *arguments.flags)
    log = root / "logs" / f"{case.name}-{method}-s{seed}.log"
    dbd("train", arguments.preset, "--method", method, "--seed", str(seed), *where, *how, log=log)
    print(f"{case.name}, {method}, seed {seed}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing, seed by seed, and print the table."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--attacks", nargs="+", choices=list(DIGITS), default=list(DIGITS))
    parser.add_argument("--methods", nargs="+", choices=["none", "dbd"], default=["none", "dbd"])
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--source", default="digits", help="source and its flags, as `dbd prepare` takes them")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    arguments = parser.parse_args(argv[:cut])
    arguments.flags = argv[cut + 1 :]
    arguments.storage = arguments.storage.resolve()
    todo = [
        (DIGITS[name], seed, method)
        for method in arguments.methods
        for seed in arguments.seeds
        for name in arguments.attacks
        if not (name == "clean" and method == "dbd")
    ]
    if arguments.list:
        print("\n".join(f"{case.name} {method} {seed}" for case, seed, method in todo))
        return
    folders = {(case.name, seed): data_set(case, seed, arguments) for case, seed, _ in todo}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda t: train(*t, folders[t[0].name, t[1]], arguments), todo))
    runs = [str(arguments.storage / case.name / method / f"s{seed}") for case, seed, method in todo]
    subprocess.run([sys.executable, "-m", "dbd_dist.cli", "report", *runs, "--format", "md"], check=True)


if __name__ == "__main__":
    main()
