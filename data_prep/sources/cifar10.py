"""CIFAR-10 from its own site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.errors import UserError
from data_prep.sources.source import OpenSource, Source
from data_prep.sources.split import in_memory


@dataclass(frozen=True, kw_only=True)
class Cifar10(Source):
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 images of 32 x 32 px, 10 classes, from its own site."""

    name: ClassVar[str] = "cifar10"

    root: Path = Path("data/cifar10")
    """Folder of the downloaded files."""
    download: bool = True
    """Download what is missing (170 MB)."""

    def find(self) -> OpenSource:
        from torchvision.datasets import CIFAR10

        try:
            train, test = (CIFAR10(str(self.root), train=part, download=self.download) for part in (True, False))
        except Exception as error:  # network, disk, checksum: torchvision raises whatever came up
            raise UserError(
                f"CIFAR-10 is not there and could not be downloaded ({error})",
                where=self.root,
                hint="download cifar-10-python.tar.gz into that folder, or use another source",
            ) from error

        def locate_train(i: int) -> str:
            return f"data_batch_{i // 10_000 + 1}#{i % 10_000}"

        return OpenSource(
            tuple(train.classes),
            in_memory(train.data, np.array(train.targets, dtype=np.int64), locate=locate_train),
            in_memory(test.data, np.array(test.targets, dtype=np.int64), locate=lambda i: f"test_batch#{i}"),
        )
