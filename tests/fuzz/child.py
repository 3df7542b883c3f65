"""Runs cases that it is sent, one a line: `python -m tests.fuzz.child ROOT`. A process of its own, so that a crash or a
hang is seen from outside.

Reads ``[target, seed]``, writes ``[outcome, detail]``: "worked", "refused", or "failed" with the traceback.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import sys
import traceback
import warnings
from pathlib import Path

MEMORY_BYTES = 6 << 30
"""Beyond what the imports took: who asks for more fails."""


def main(root: Path) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["RAY_ADDRESS"] = "local"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("DBD_STORAGE", None)
    faulthandler.enable()
    import torch

    from tests.fuzz.targets import FAULTS, TARGETS, Material

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    material = Material(root)
    for part in ("dataset", "jpeg", "clean", "artefact", "perturbed", "images", "run"):
        getattr(material, part)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    print(json.dumps(["ready", ""]), file=replies, flush=True)
    for line in sys.stdin:
        target, seed = json.loads(line)
        try:
            reply = [(TARGETS | FAULTS)[target].run(material, random.Random(f"{target}:{seed}")), ""]
        except BaseException:  # whatever it is, it is what is looked for
            reply = ["failed", traceback.format_exc()]
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
