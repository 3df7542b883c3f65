"""`dbd doctor`: is this machine fit to run, or with folders named, is what lies in them whole?"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError, printable


def main(argv: list[str]) -> int:
    """Check the folders that are named; without one the machine, see `cluster.check`.

    Raises:
        UserError: a folder is damaged, or holds nothing that can be checked.
    """
    folders = [a for a in argv if not a.startswith("-")]
    if argv and len(folders) == len(argv):
        return _folders([Path(folder) for folder in folders])
    from cluster import check

    if not any(a in ("-h", "--help") for a in argv):
        return check.main(argv)
    print("dbd doctor FOLDER [FOLDER ...] checks every sample of data sets, and the files of artefacts and runs.\n")
    return check.main(argv)


def _folders(folders: list[Path]) -> int:
    damaged: list[UserError] = []
    for folder in folders:
        print(printable(str(folder)), flush=True)
        try:
            for name, detail in _checks(folder):
                print(f"  ok    {name:<9} {detail}", flush=True)
        except UserError as error:
            damaged.append(error)
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
            damaged.append(UserError(problem, where=error.filename or folder))
    if len(damaged) == 1:
        raise damaged[0]
    if damaged:
        raise UserError(f"{len(damaged)} of {len(folders)} are damaged. {' '.join(map(str, damaged))}")
    print("Whole.")
    return 0


def _checks(folder: Path) -> Iterator[tuple[str, str]]:
    from data_prep.dataset import verify

    if verify.is_dataset(folder):
        checks = verify.verify_dataset(folder)
    elif verify.is_artefact(folder):
        checks = verify.verify_artefact(folder)
    elif (folder / "run.json").is_file():
        yield from _run(folder)
        return
    else:
        raise UserError(
            "nothing to check: there is no manifest.json, artefact.json or run.json",
            where=folder,
            expected="a folder that dbd prepare, dbd craft or dbd train made",
        )
    for passed in checks:
        yield passed.name, passed.detail


def _run(folder: Path) -> Iterator[tuple[str, str]]:
    """A run folder: every file that is there reads as what it should be."""
    import torch

    from dbd_dist.models.exported import read_exported
    from dbd_dist.reporting.runs import load_run
    from dbd_dist.runtime.checkpoint import CHECKPOINT_KEYS, checkpoint_files, load_state

    run = load_run(folder)
    missing = f"; missing: {', '.join(run.missing)}" if run.missing else ""
    yield "run", printable(f"{run.method} on {run.dataset}, {run.state}{missing}")
    for stem in ("model", "backbone"):
        weights = folder / f"{stem}.safetensors"
        if weights.exists() or weights.with_suffix(".json").exists():
            exported = read_exported(weights)
            exported.build(torch.device("cpu"))
            seal = "sha256 as in the description" if exported.sealed else "NOT vouched for: the description has none"
            yield stem, seal
    for path in checkpoint_files(folder / "checkpoints"):
        state = load_state(path, needs=CHECKPOINT_KEYS)
        yield "state", printable(f"{path.name}: {state['stage']}, epoch {state['state']['epoch']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
