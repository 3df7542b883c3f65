"""`dbd bench`: the measured benchmarks, as a table and as JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import tyro

from data_prep.errors import UserError

Name = Literal[
    "loader", "jpeg", "augmentation", "simclr", "mixmatch", "split", "encode", "epoch", "scaling", "memory", "ray"
]


MIN_IMAGES = 64
"""In a training set: fewer make no batches."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure how fast this machine runs every part, beside the floor and beside what others use."""

    only: tuple[Name, ...] = ()
    """These benchmarks alone. Default: all but ray, which starts Ray again and again and runs when it is named."""
    json: Path | None = None
    """File to write every figure to, with the machine, versions and commit."""
    data: Path | None = None
    """Dataset folder for loader, jpeg and epoch. Default: synthetic 32 px images, encoded for the occasion."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is any."""
    repeats: int = 5
    """Times that everything is measured, after a warm-up."""
    threads: int = 1
    """Threads of torch on the CPU."""
    quick: bool = False
    """Tiny work: shows in a minute that everything runs, and measures little."""


def main(argv: list[str]) -> int:
    """Measure and print."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd bench")
    for name, most in (("repeats", 10_000), ("threads", 1024)):
        if not 1 <= getattr(arguments, name) <= most:
            raise UserError(f"{getattr(arguments, name)} is not allowed", where=f"--{name}", expected=f"1 to {most}")
    import torch

    from data_prep.dataset.manifest import open_dataset
    from dbd_dist.bench.images import prepare_synthetic
    from dbd_dist.bench.row import HEADINGS, Row, Setup, cells
    from dbd_dist.bench.run import ON_REQUEST, describe, run, write
    from dbd_dist.distributed.world import check_device
    from dbd_dist.launch.local import check_place

    if arguments.json is not None:
        check_place(Path(os.path.realpath(arguments.json.parent)), hint="choose another --json")
        if os.path.isdir(arguments.json):
            raise UserError("is a folder", where=arguments.json, expected="a file", hint="choose another --json")
    check_device(arguments.device)
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    names = arguments.only or tuple(name for name in get_args(Name) if name not in ON_REQUEST)
    with tempfile.TemporaryDirectory(prefix="dbd-bench-") as folder:
        scratch = Path(folder)
        if arguments.data is not None:
            dataset = open_dataset(arguments.data)
            count = dataset.manifest.counts["train"]
            if count < MIN_IMAGES:
                raise UserError(f"{count} training images", where=arguments.data, expected=f"{MIN_IMAGES} or more")
        else:
            train = 100 if arguments.quick else 20000 if cuda else 2000
            dataset = prepare_synthetic(scratch, train=train, test=max(train // 10, 20), px=32)
        setup = Setup(
            dataset=dataset, scratch=scratch, device=device, repeats=1 if arguments.quick else arguments.repeats,
            quick=arguments.quick, threads=arguments.threads,
        )  # fmt: skip
        about = describe(setup, ["dbd", "bench", *argv])
        host = about["host"]
        print(
            f"{about['device']} ({host['cpu']}, {host['cores']} cores), {about['precision']}, {setup.threads} thread(s)"
        )
        print(f"torch {about['versions']['torch']}, commit {about['commit']}\n")
        print("| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|", flush=True)
        done: list[Row] = []

        def show(row: Row) -> None:
            print("| " + " | ".join(cells(row)) + " |", flush=True)
            done.append(row)
            if arguments.json is not None:  # after every row: an interrupted run keeps what it measured
                write(arguments.json, about, done)

        run(names, setup, show)
    if arguments.json is not None:
        print(f"\n{arguments.json}", file=sys.stderr)
    return 0
