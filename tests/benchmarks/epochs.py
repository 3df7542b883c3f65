"""One epoch of every stage of a preset on real images, on this machine: seconds and peak memory of each stage.

    python -m tests.benchmarks.epochs imagenet_subset_badnets --data DATASET --json docs/results/epochs_224px.json

Runs `dbd train` as a user would, DBD and plain training, each stage for one epoch; MixMatch's epoch is as many steps as
show every image once. SimCLR goes through its batch in chunks, since 512 images of 224 px need more memory than a small
machine has. The data set is read in two ways, whole in memory and streamed; the peak is that of the process
(VmHWM of Linux, which is set back when a stage begins). Other work on the machine shows in the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset.manifest import open_dataset
from dbd_dist.presets import preset
from tests.benchmarks.record import record

METHODS = ("none", "dbd")
READING = {"in memory": "16", "streamed": "0"}
"""`--compute.resident-gib` of each way."""


def flags(name: str, images: int, chunk: int) -> dict[str, list[str]]:
    """One epoch of each stage, by method."""
    mixmatch: Any = preset(name).config("dbd").method.stages()[-1]
    steps = max(images // 2 // mixmatch.batch, 1)  # half keeps its labels
    return {
        "none": ["--supervised.epochs", "1"],
        "dbd": [
            "--simclr.epochs", "1", "--simclr.warmup-epochs", "0", "--simclr.chunk", str(chunk),
            "--warmup.epochs", "1", "--mixmatch.epochs", "1", "--mixmatch.steps", str(steps),
        ],
    }  # fmt: skip


class Peak:
    """The largest memory of a process since it was last asked."""

    def __init__(self, pid: int):
        self._folder = Path("/proc") / str(pid)

    def take_mib(self) -> float:
        """Raises: OSError: the process has ended."""
        words = dict(line.split(":", 1) for line in (self._folder / "status").read_text().splitlines() if ":" in line)
        (self._folder / "clear_refs").write_text("5")  # sets VmHWM to what is held now
        return int(words["VmHWM"].split()[0]) / 1024


def peaks_of(process: subprocess.Popen[str]) -> Iterator[tuple[str, float]]:
    """Each stage that the run's progress names, with its peak in MiB, as soon as the next one begins. What the run
    says is passed on."""
    assert process.stdout is not None
    peak, current = Peak(process.pid), ""
    for line in process.stdout:
        print(line, end="", file=sys.stderr)
        name, colon, _ = line.partition(": epoch ")
        if colon and name != current:
            if current:
                yield current, peak.take_mib()
            else:
                peak.take_mib()
            current = name
        if not colon and current:  # the lines at the end, while the process still is
            yield current, peak.take_mib()
            break
    for line in process.stdout:
        print(line, end="", file=sys.stderr)


def measure(name: str, data: Path, method: str, reading: str, more: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every stage of one run."""
    storage = Path(tempfile.mkdtemp(prefix="epochs-"))
    try:
        argv = [
            "train", name, "--method", method, "--data", str(data), "--storage", str(storage), "--name", "run",
            "--launcher", "local", "--compute.device", "cpu", "--compute.resident-gib", READING[reading], *more,
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "dbd_dist", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        peaks = dict(peaks_of(process))
        if process.wait() != 0:
            raise SystemExit(f"dbd {' '.join(argv)}: exit status {process.returncode}")
        result = json.loads((storage / "run" / "result.json").read_text())
    finally:
        shutil.rmtree(storage)
    encoding = open_dataset(data).manifest.encoding["kind"]
    return [
        {
            "stage": stage, "images": reading, "encoding": encoding, "seconds": seconds,
            "peak MiB": round(peaks[stage]), "precision": result["precision"],
        }
        for stage, seconds in result["seconds"].items()
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write a file of docs/results/."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("preset")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders of `dbd prepare`")
    parser.add_argument("--reading", choices=tuple(READING), nargs="+", default=tuple(READING))
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument("--chunk", type=int, default=64, help="images of a SimCLR batch at a time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    words = " ".join(["python -m tests.benchmarks.epochs", *(argv if argv is not None else sys.argv[1:])])
    note = f"one epoch of each stage; {len(os.sched_getaffinity(0))} cores; peak of the process, images included"
    for data in arguments.data:
        images = open_dataset(data).manifest.counts["train"]
        for reading in arguments.reading:
            for method in arguments.methods:
                more = flags(arguments.preset, images, arguments.chunk)[method]
                rows += [
                    {"training images": images, **row} for row in measure(arguments.preset, data, method, reading, more)
                ]
                record(arguments.json, rows, command=words, note=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
