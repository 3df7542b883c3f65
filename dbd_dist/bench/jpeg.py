"""Large images stored as JPEG: streamed from FFCV's file, beside the raw stream, and through torch's DataLoader with
Pillow and torchvision from the same JPEGs as files.

The images are those of the data set where it has large ones, else drawn with the spectrum of photographs, 224 px. As in
loader.py a CPU's figures are processor time, decoding threads included.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from data_prep.beton import BetonStream, check_beton, write_beton
from data_prep.beton.jpeg import QUALITY, encode_jpeg
from dbd_dist.bench import loader, torchvision
from dbd_dist.bench.images import natural
from dbd_dist.bench.row import Row, Setup
from dbd_dist.data import augment
from dbd_dist.data.loaders import ResidentImages, StreamedImages

LARGE_PX, DRAWN_PX = 64, 224


def measure(setup: Setup) -> Iterator[Row]:
    device = setup.device
    pixels = _images(setup, setup.pick(cuda=4096, cpu=256, quick=16))
    px, count = pixels.shape[1], len(pixels)
    batch = min(count, setup.pick(cuda=512, cpu=64, quick=8))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // batch * batch]
    positions = order.view(-1, batch)

    labels = np.zeros(count, dtype=np.int64)
    raw, jpeg = setup.scratch / "raw.beton", setup.scratch / "jpeg.beton"
    write_beton(raw, pixels, labels)
    write_beton(jpeg, pixels, labels, jpeg_quality=QUALITY)
    few = min(count, setup.pick(cuda=count, cpu=64, quick=8))
    paths = _write_jpegs(setup.scratch / "jpegs", pixels[order[:few].numpy()])

    def streamed(path: Path) -> StreamedImages:
        # on a CPU one thread: its figure is processor time, and waits of threads for each other are not to be in it
        stream = BetonStream(path, threads=None if device.type == "cuda" else 1)
        return StreamedImages(stream, torch.from_numpy(labels).to(device), device)

    resident = ResidentImages(torch.from_numpy(pixels).to(device), torch.from_numpy(labels).to(device))
    images = {"FFCV stream, JPEG": streamed(jpeg), "FFCV stream, raw": streamed(raw), "resident": resident}
    as_bytes = loader.files(paths, loader.as_bytes, batch=min(batch, few), device=device)
    views = loader.files(
        paths, loader.TwoViews(torchvision.pillow(augment.simclr(), px)), batch=min(batch, few), device=device
    )
    stored = float(check_beton(jpeg).data_bytes.mean())
    reference = f"{loader.REFERENCE}, JPEG files"
    notes = {
        "FFCV stream, JPEG": {"bytes_an_image": stored},
        "FFCV stream, raw": {"bytes_an_image": float(px * px * 3)},
        reference: {"bytes_an_image": float(np.mean([path.stat().st_size for path in paths]))},
    }
    yield from loader.rows(
        setup, "jpeg", loader.READ, px,
        {name: (loader.read(i, positions), len(order)) for name, i in images.items()}
        | {reference: (loader.through(as_bytes, device), few)},
        reference, notes,
    )  # fmt: skip
    yield from loader.rows(
        setup, "jpeg", loader.VIEWS, px,
        {name: (loader.read_and_augment(i, positions, px), len(order)) for name, i in images.items()}
        | {reference: (loader.through(views, device), few)},
        reference, notes,
    )  # fmt: skip


def _images(setup: Setup, most: int) -> np.ndarray:
    """uint8 (n, px, px, 3): up to `most` training images of the data set, where they are large, else drawn ones."""
    manifest = setup.dataset.manifest
    if manifest.image_px < LARGE_PX:
        return natural(most, DRAWN_PX)
    count = min(manifest.counts["train"], most)
    spread = np.arange(count) * manifest.counts["train"] // count
    with BetonStream(setup.dataset.train) as stream:
        return np.concatenate([images.copy() for images, _, _ in stream.batches(spread, min(count, 64))])


def _write_jpegs(folder: Path, images: np.ndarray) -> list[Path]:
    """The same bytes as in the .beton file, as one file each."""
    folder.mkdir()
    paths = [folder / f"{i:06d}.jpg" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encode_jpeg(image, QUALITY))
    return paths
