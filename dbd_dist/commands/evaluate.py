"""`dbd evaluate RUN`: measure the exported model of a run again, on its data set or another one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure a run's model: clean accuracy, attack success, robust and per-class accuracy, as JSON."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or its address in an object store."""
    data: Path | None = None
    """Dataset folder; the run's own unless given."""


def main(argv: list[str]) -> int:
    """Load model.safetensors without the trainer, measure it, print JSON."""
    arguments = tyro.cli(Arguments, args=argv, prog="dbd evaluate")
    from dbd_dist.evaluation.exported import measure_run
    from dbd_dist.runtime.bucket.folder import local_folder

    print(json.dumps(dataclasses.asdict(measure_run(local_folder(arguments.run), arguments.data)), indent=2))
    return 0
