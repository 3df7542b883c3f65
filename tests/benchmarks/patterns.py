"""How many poisoned images a linear function of the pixels finds, of the training images of data sets.

    python -m tests.benchmarks.patterns DATA... [--deals 10] [--json docs/results/linear_patterns.json]

Halves are dealt with seeds from 0.
The truth is read here, and by nothing that marks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from dbd_dist.data.linear_patterns import pattern_scores, shrink, stand_out
from dbd_dist.data.loaders import ResidentImages
from tests.benchmarks.record import record

READ = 512
"""Images at a time."""


def count(folder: Path, deals: int) -> dict[str, Any]:
    """Poisoned images of the training set, how many of them stand out, and how many clean ones do, least and most over
    deals of the halves."""
    dataset = open_dataset(folder)
    images = ResidentImages.read(dataset, torch.device("cpu"))
    pixels = torch.cat([shrink(part) for part in images.batches(torch.arange(len(images)).split(READ))])
    poisoned = torch.from_numpy(read_truth(folder)["train"].poisoned)
    found, lost = [], []
    for seed in range(deals):
        scores = pattern_scores(pixels, images.labels, torch.Generator().manual_seed(seed))
        marked = stand_out(scores, images.labels, dataset.manifest.num_classes)
        found.append(int((marked & poisoned).sum()))
        lost.append(int((marked & ~poisoned).sum()))
    return {
        "data": folder.name,
        "images": len(images),
        "poisoned": int(poisoned.sum()),
        "deals": deals,
        "found": f"{min(found)} to {max(found)}",
        "clean images lost": f"{min(lost)} to {max(lost)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--deals", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    record(
        given.json,
        [count(folder, given.deals) for folder in given.data],
        command=f"python -m tests.benchmarks.patterns DATA... --deals {given.deals}",
        note="Images that carry a pattern which marks their label (docs/accuracy.md).",
    )


if __name__ == "__main__":
    main()
