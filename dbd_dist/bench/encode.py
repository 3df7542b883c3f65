"""Time and memory of `dbd prepare`, measured from outside as a user would see them.

    python -m dbd_dist.bench.encode FOLDER [--attack badnets] [--train-per-class N] [--workers N] [--scratch FOLDER]
                                    [-- FLAGS]

measures a folder of Parquet files and prints one JSON line; `dbd bench` measures a folder of small PNG files. `seconds`
is the whole command, start of Python included; `images_per_s` counts each image of the source once, though a test image
is written twice, without and with the trigger. The data set is made in a scratch folder and removed. Files that were
read before come from the system's cache: run it twice for a warm figure.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.dataset.manifest import read_manifest
from data_prep.errors import UserError
from data_prep.threads import available_cores
from dbd_dist.bench.images import write_image_folder
from dbd_dist.bench.row import Row, Setup

SAMPLE_EVERY_S = 0.02


class TreeMemory:
    """The largest sum of resident memory over a process and its descendants, sampled; shared pages count for each.

    None where there is no /proc.
    """

    def __init__(self, pid: int):
        self.peak_kib: int | None = None
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            total = sum(_resident_kib(pid) for pid in _tree(self._pid))
            if total:
                self.peak_kib = max(self.peak_kib or 0, total)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:  # grows while it is walked
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # the thread ended
                continue
    return found


def _resident_kib(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize() // 1024


def measure(setup: Setup) -> Iterator[Row]:
    px = setup.dataset.manifest.image_px
    count = setup.pick(cuda=20000, cpu=2000, quick=40) // (1 if px < 64 else 20)
    root = write_image_folder(setup.scratch / "to-encode", train=count, test=max(count // 5, 10), px=px)
    source = ["imagefolder", "badnets", "--root", str(root), "--image-px", str(px), "--resize-px", str(px)]
    found = [encode(source, setup.scratch) for _ in range(1 if setup.quick else min(setup.repeats, 3))]
    title = f"dbd prepare, PNG files, {px} px, {found[0]['counts']['train']} + {found[0]['counts']['test']} images"
    seconds = [f["seconds"] for f in found]
    for name, unit, values in (
        ("", "s", seconds),
        (", images", "images/s", [f["images_per_s"] for f in found]),
        (", memory of all processes", "MiB", [f["peak_rss_sum_mib"] or float("nan") for f in found]),
    ):
        yield Row(bench="encode", name=title + name, unit=unit, values=values)


def encode(source: list[str], scratch: Path | None) -> dict:
    """Run `dbd prepare` with these arguments in a process of its own."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "dataset"
        command = [sys.executable, "-m", "dbd_dist.cli", "prepare", *source, "--out", str(out)]
        start_s = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        memory = TreeMemory(process.pid)
        code = process.wait()
        seconds = time.perf_counter() - start_s
        memory.stop()
        if code:
            raise UserError(f"dbd prepare ended with code {code}", where=" ".join(command))
        manifest = read_manifest(out)
        written = sum(record.bytes for record in manifest.files.values())
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1024 if sys.platform == "darwin" else 1  # macOS tells bytes, Linux KiB
    images = manifest.counts["train"] + manifest.counts["test"]
    return {
        "benchmark": "encode",
        "image_px": manifest.image_px,
        "counts": dict(manifest.counts),
        "seconds": round(seconds, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "images_per_s": round(images / seconds, 1),
        "written_mib": round(written / 2**20, 1),
        "peak_rss_largest_mib": round(used.ru_maxrss / unit / 1024, 1),
        "peak_rss_sum_mib": None if memory.peak_kib is None else round(memory.peak_kib / 1024, 1),
        "cores": available_cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": dict(manifest.versions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of train.parquet and test.parquet")
    parser.add_argument("--attack", default="badnets", help="its name, e.g. clean, wanet, sig")
    parser.add_argument("--train-per-class", type=int, help="keep this many training images a class")
    parser.add_argument("--workers", type=int, help="threads that decode; without it one for each core")
    parser.add_argument("--scratch", type=Path, help="where the data set is written; without it the temporary folder")
    arguments, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    for name in ("train_per_class", "workers"):
        value = getattr(arguments, name)
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    found = encode(["parquet", arguments.attack, "--root", str(arguments.root), *flags], arguments.scratch)
    found |= {"root": arguments.root.resolve().name, "attack": arguments.attack, "flags": flags}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
