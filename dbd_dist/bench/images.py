"""Images to measure with: files on disk, and the data set that the real encoder makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.dataset.manifest import Dataset

CLASSES = 10


def smooth(count: int, px: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, px, px, 3): random colours that change slowly over the image, as in photographs."""
    draws = np.random.default_rng(seed)
    coarse = draws.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((px, px), Image.Resampling.BICUBIC)) for c in coarse])


def natural(count: int, px: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, px, px, 3): noise whose power falls with the frequency about as that of photographs does."""
    draws = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(px)[:, None], np.fft.rfftfreq(px)[None, :])
    frequency[0, 0] = np.inf
    images = np.empty((count, px, px, 3), dtype=np.uint8)
    for image in images:
        gray, colour = draws.normal(size=(1, px, px)), draws.normal(size=(3, px, px))
        filtered = np.fft.irfft2(np.fft.rfft2(gray + 0.3 * colour) / frequency**1.25, s=(px, px))
        image[...] = (128 + 48 * filtered / filtered.std()).clip(0, 255).transpose(1, 2, 0)
    return images


def write_files(folder: Path, images: np.ndarray, suffix: str = "png") -> list[Path]:
    """Images (n, H, W, 3) as one file each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:06d}.{suffix}" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths


def write_image_folder(root: Path, *, train: int, test: int, px: int) -> Path:
    """ROOT/train/CLASS/*.png and ROOT/test/CLASS/*.png of ten classes."""
    for split, count in (("train", train), ("test", test)):
        images = smooth(count, px, seed=len(split))
        for label in range(CLASSES):
            write_files(root / split / f"class{label}", images[label::CLASSES])
    return root


def prepare_synthetic(folder: Path, *, train: int, test: int, px: int) -> Dataset:
    """A data set of `train` and `test` images under BadNets, as `dbd prepare imagefolder` makes it."""
    from data_prep.attacks import BadNets
    from data_prep.config import PrepareConfig
    from data_prep.pipeline import prepare
    from data_prep.sources import ImageFolder

    root = write_image_folder(folder / "images", train=train, test=test, px=px)
    source = ImageFolder(root=root, image_px=px, resize_px=px)
    return prepare(PrepareConfig(source=source, attack=BadNets(), datasets=folder, workers=1), progress=False)
