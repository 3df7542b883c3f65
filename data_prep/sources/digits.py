"""Scanned digits of scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from data_prep.errors import UserError
from data_prep.sources.source import OpenSource, Source
from data_prep.sources.split import in_memory


@dataclass(frozen=True, kw_only=True)
class Digits(Source):
    """1,797 scans of handwritten digits that come with scikit-learn: 8 x 8 px, 10 classes, no download.

    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. Enlarged (bilinear) and made
    RGB. The split into training and test images is stratified and always the same.
    """

    name: ClassVar[str] = "digits"

    image_px: int = 16
    """Side of the images, 8 to 512."""
    test_fraction: float = 0.2
    """Share of test images, in every class."""

    def __post_init__(self):
        super().__post_init__()
        if not 8 <= self.image_px <= 512:  # all of them are held in memory
            raise UserError(f"images of {self.image_px} px", where="image_px", expected="8 to 512")
        if not 0 < self.test_fraction < 1:
            raise UserError(
                f"test fraction {self.test_fraction} is out of range",
                where="test_fraction",
                expected="above 0 and below 1",
            )

    def find(self) -> OpenSource:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        scans = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # grey levels 0 to 16
        labels = bunch.target.astype(np.int64)
        images = np.empty((len(scans), self.image_px, self.image_px, 3), dtype=np.uint8)
        for image, scan in zip(images, scans):
            size = (self.image_px, self.image_px)
            image[:] = np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BILINEAR))[:, :, None]

        rng = np.random.default_rng(1998)  # not the poison's seed: the clean images stay the same under it
        is_test = np.zeros(len(labels), dtype=bool)
        for label in range(10):
            members = rng.permutation(np.flatnonzero(labels == label))
            is_test[members[: max(1, round(self.test_fraction * len(members)))]] = True
        everything = in_memory(images, labels, locate=lambda i: f"sklearn load_digits #{i}")
        return OpenSource(tuple("0123456789"), everything.take(~is_test), everything.take(is_test))

    @property
    def stem(self) -> str:
        return self.name if self.image_px == 16 else f"{self.name}-{self.image_px}px"
