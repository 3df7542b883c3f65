"""Batches of training images: from FFCV's file, from memory, and through torch's DataLoader with Pillow.

Raw reads end with uint8 images on the device, the others with two normalised SimCLR views of each there. On a CPU the
figure is the processor time of the whole process, decoding threads included; with a GPU it is the time that passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data_prep.beton import read_beton
from data_prep.threads import available_cores
from dbd_dist.bench import torchvision
from dbd_dist.bench.floor import peak_bytes
from dbd_dist.bench.images import write_files
from dbd_dist.bench.row import Row, Setup, ratio
from dbd_dist.bench.timing import Work, rounds
from dbd_dist.data import augment
from dbd_dist.data.loaders import Images, ResidentImages, StreamedImages

READ, VIEWS, REFERENCE = "raw read", "two SimCLR views", "DataLoader, Pillow"


class Files(TorchDataset):
    """Image files, as most projects read them."""

    def __init__(self, paths: list[Path], transform: Callable[[Any], Any]):
        self._paths, self._transform = paths, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Any:
        with Image.open(self._paths[i]) as image:
            return self._transform(image.convert("RGB"))


def as_bytes(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class TwoViews:
    """A transform applied twice."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        self._transform = transform

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        return self._transform(image), self._transform(image)


def files(paths: list[Path], transform: Callable[[Any], Any], *, batch: int, device: torch.device) -> DataLoader:
    """The loader that most projects have: Pillow in worker processes, on a CPU in this one."""
    workers = min(available_cores(), 16) if device.type == "cuda" else 0
    return DataLoader(
        Files(paths, transform), batch_size=batch, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip


def read(images: Images, positions: Tensor) -> Work:
    def work() -> None:
        for _ in images.batches(positions):
            pass

    return work


def read_and_augment(images: Images, positions: Tensor, px: int) -> Work:
    generator, config = torch.Generator().manual_seed(0), augment.simclr()

    def work() -> None:
        for pixels_BCHW in images.batches(positions):
            for _ in range(2):
                params = augment.draw(config, len(pixels_BCHW), height=px, width=px, generator=generator)
                augment.apply(config, pixels_BCHW, params)

    return work


def through(loader: DataLoader, device: torch.device) -> Work:
    def work() -> None:
        for given in loader:
            for part in given if isinstance(given, list) else [given]:
                part.to(device, non_blocking=True)

    return work


def rows(
    setup: Setup,
    bench: str,
    group: str,
    px: int,
    members: dict[str, tuple[Work, int]],
    reference: str,
    notes: dict[str, dict[str, Any]] | None = None,
) -> Iterator[Row]:
    """One row for each of `members`: name -> (work, images that it reads)."""
    speed, source = peak_bytes(setup.device)
    times = rounds(
        {name: work for name, (work, _) in members.items()},
        repeats=setup.repeats,
        device=setup.device,
        clock=time.process_time,
    )
    us = {name: [t / members[name][1] * 1e6 for t in seconds] for name, seconds in times.items()}
    moved = px * px * 3 * (2 if group == READ else 1 + 2 * 4)
    for name, values in us.items():
        yield Row(
            bench=bench,
            name=f"{group}, {px} px, {name}",
            unit="us an image" if setup.device.type == "cuda" else "CPU us an image",
            values=values,
            floor=moved / speed * 1e6,
            floor_is=f"bytes in and out over bandwidth ({source})",
            reference=reference,
            ratio=ratio(us[reference], values),
            notes=(notes or {}).get(name, {}),
        )


def measure(setup: Setup) -> Iterator[Row]:
    dataset, device = setup.dataset, setup.device
    px, count = dataset.manifest.image_px, dataset.manifest.counts["train"]
    small = px < 64
    take = min(count, setup.pick(cuda=16384 if small else 2048, cpu=2048 if small else 128, quick=32))
    batch = min(take, setup.pick(cuda=512, cpu=256 if small else 32, quick=16))
    few = min(take, setup.pick(cuda=take, cpu=256 if small else 32, quick=16))
    config = augment.simclr()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: take // batch * batch]
    positions = order.view(-1, batch)

    pixels, _, _ = read_beton(dataset.train)
    paths = write_files(setup.scratch / "files", pixels[order[:few].numpy()])
    resident, streamed = ResidentImages.read(dataset, device), StreamedImages.open(dataset, device)
    raw = files(paths, as_bytes, batch=min(batch, few), device=device)
    views = files(paths, TwoViews(torchvision.pillow(config, px)), batch=min(batch, few), device=device)
    yield from rows(
        setup, "loader", READ, px,
        {
            "FFCV stream": (read(streamed, positions), len(order)),
            "resident": (read(resident, positions), len(order)),
            REFERENCE: (through(raw, device), few),
        },
        REFERENCE,
    )  # fmt: skip
    yield from rows(
        setup, "loader", VIEWS, px,
        {
            "FFCV stream": (read_and_augment(streamed, positions, px), len(order)),
            "resident": (read_and_augment(resident, positions, px), len(order)),
            REFERENCE: (through(views, device), few),
        },
        REFERENCE,
    )  # fmt: skip
