"""`dbd demo`: poison the embedded images, train without and with defence, compare."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from dbd_dist.launch.start import STORAGE, check_storage, launch, prepare_for
from dbd_dist.presets import preset


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """End-to-end demo on 1,797 embedded images of digits: 5 % get a small patch and the label of the target class.

    Training without defence learns the backdoor. DBD does not.
    """

    seed: int = 0
    """Seed of the poisoning and of both runs."""
    name: str = "demo"
    """Folder of both runs and the report under the storage."""
    storage: Path = STORAGE
    """Where run folders lie. Default: $DBD_STORAGE, or runs/."""


def main(argv: list[str]) -> int:
    """Run both methods on Ray workers and write the report."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd demo")
    from cluster import session, topology
    from dbd_dist.launch.local import check_name
    from dbd_dist.reporting.page import write_report
    from dbd_dist.reporting.tables import format_results

    start = time.monotonic()
    check_name(arguments.name)
    check_storage(arguments.storage)
    chosen = preset("demo")
    workers = min(2, topology.this_machine().cpus)
    chosen = dataclasses.replace(chosen, compute=dataclasses.replace(chosen.compute, workers=workers))
    data = prepare_for(chosen, arguments.seed, arguments.storage)
    results, folders = [], []
    with session.connect():
        for number, (method, title) in enumerate(
            (("none", "training without defence"), ("dbd", "training with DBD")), start=1
        ):
            print(f"\n{number}/2 {title}", flush=True)
            name = f"{arguments.name}/{method}"
            config = dataclasses.replace(chosen.config(method), seed=arguments.seed, data=data)
            results.append(launch(config, arguments.storage, name, "ray"))
            folders.append(arguments.storage / name)
    page = write_report(folders, arguments.storage / arguments.name / "report.html")
    print("\n" + format_results(results))
    print(f"\nreport: {page}\ndone in {time.monotonic() - start:.0f} s")
    return 0
