"""How many poisoned images a linear function of the pixels finds: `python -m tests.benchmarks.patterns DATA...`.

One JSON line a data set. The truth is read here, and by nothing that marks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.truth import read_truth
from dbd_dist.data.linear_patterns import pattern_scores, shrink, stand_out
from dbd_dist.data.loaders import ResidentImages

READ = 512
"""Images at a time."""


def count(folder: Path) -> dict[str, object]:
    """Poisoned images of the training set, how many of them stand out, and how many clean ones do."""
    dataset = open_dataset(folder)
    images = ResidentImages.read(dataset, torch.device("cpu"))
    pixels = torch.cat([shrink(part) for part in images.batches(torch.arange(len(images)).split(READ))])
    classes = dataset.manifest.num_classes
    scores = pattern_scores(pixels, images.labels, classes, torch.Generator().manual_seed(0))
    marked = stand_out(scores, images.labels, classes)
    poisoned = torch.from_numpy(read_truth(folder)["train"].poisoned)
    found = int((marked & poisoned).sum())
    lost = int(marked.sum()) - found
    return {"images": len(images), "poisoned": int(poisoned.sum()), "found": found, "clean images lost": lost}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"data": Path(name).name} | count(Path(name))))
