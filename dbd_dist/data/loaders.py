"""Batches of the training images, as the victim of an attack would have them: pixels and given labels, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_prep.beton import BetonStream, read_beton
from data_prep.dataset.manifest import Dataset
from dbd_dist.runtime.watchdog import beat

SplitName = Literal["train", "holdout"]
"""The training images, or those that were set aside clean before poisoning."""


class Images(Protocol):
    """The images of a data set's split, by position; positions are the split's sample indices."""

    labels: Tensor
    """int64 (N,), on the device: the labels as they were given."""

    def __len__(self) -> int: ...

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        """For each int64 (B,) of positions the images: uint8 (B, 3, H, W) on the device, channels_last in memory."""
        ...


class ResidentImages:
    """All images on the device as uint8: read once through FFCV, then indexed there."""

    def __init__(self, images_NHWC: Tensor, labels: Tensor):
        self._images = images_NHWC
        self.labels = labels

    @classmethod
    def read(
        cls, dataset: Dataset, device: torch.device, threads: int | None = None, split: SplitName = "train"
    ) -> ResidentImages:
        count, px = dataset.manifest.counts[split], dataset.manifest.image_px
        images, labels, _ = read_beton(getattr(dataset, split), expect_count=count, expect_px=px, threads=threads)
        return cls(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        chosen = list(positions)
        if not chosen:
            return
        # one copy for all batches: each would wait for the device
        order = torch.cat(chosen).to(self._images.device)
        for part in order.split([len(c) for c in chosen]):
            beat()
            yield self._images[part].permute(0, 3, 1, 2)


class StreamedImages:
    """Images that do not fit on the device: read through FFCV batch by batch, in the order asked for."""

    def __init__(self, stream: BetonStream, labels: Tensor, device: torch.device):
        self._stream, self.labels, self._device = stream, labels, device

    @classmethod
    def open(
        cls, dataset: Dataset, device: torch.device, threads: int | None = None, split: SplitName = "train"
    ) -> StreamedImages:
        manifest = dataset.manifest
        stream = BetonStream(
            getattr(dataset, split), expect_count=manifest.counts[split], expect_px=manifest.image_px, threads=threads
        )
        return cls(stream, torch.from_numpy(stream.labels).to(device), device)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, positions: Iterable[Tensor]) -> Iterator[Tensor]:
        chosen = list(positions)
        if not chosen:
            return
        size = len(chosen[0])
        assert all(len(c) == size for c in chosen[:-1]), "a stream reads batches of one size, the last may be shorter"
        order = torch.cat(chosen).numpy()
        read = (torch.from_numpy(images) for images, _, _ in self._stream.batches(order, size))
        if self._device.type == "cuda":
            read = copied_ahead(read, self._device)
        else:  # views into FFCV's ring, overwritten by what comes next: copy before handing out
            read = (images.clone() for images in read)
        for images in read:
            beat()
            yield images.permute(0, 3, 1, 2)


def copied_ahead(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of pinned-memory copies on a GPU, one ahead of the one in use: the copy of the next runs beside the
    computation on this one, and the host waits for copies only, never for that.

    Args:
        batches: uint8 CPU tensors, none larger than the first; each is read before the next is asked for.
    """
    copies = torch.cuda.Stream(device)
    pinned: list[Tensor] = []
    free = [torch.cuda.Event(), torch.cuda.Event()]
    waiting: tuple[Tensor, torch.cuda.Event] | None = None

    def hand_out(batch: Tensor, arrived: torch.cuda.Event) -> Tensor:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(arrived)
        batch.record_stream(computing)  # its memory was allocated for the other stream
        return batch

    for i, images in enumerate(batches):
        if not pinned:
            pinned = [torch.empty_like(images, pin_memory=True) for _ in range(2)]
        free[i % 2].synchronize()  # the copy out of this buffer two batches ago
        source = pinned[i % 2][: len(images)].copy_(images)
        with torch.cuda.stream(copies):
            batch = source.to(device, non_blocking=True)
            free[i % 2].record(copies)
            arrived = torch.cuda.Event()
            arrived.record(copies)
        if waiting is not None:
            yield hand_out(*waiting)
        waiting = (batch, arrived)
    if waiting is not None:
        yield hand_out(*waiting)


def open_images(
    dataset: Dataset,
    device: torch.device,
    *,
    resident_gib: float,
    threads: int | None = None,
    split: SplitName = "train",
) -> Images:
    """Resident where the decoded images take at most `resident_gib`, else streamed; both give the same batches.

    JPEGs are decoded on `threads`, without it one for each core: once for all where they are resident, once an epoch
    where they are streamed.
    """
    manifest = dataset.manifest
    decoded = manifest.counts[split] * manifest.image_px**2 * 3
    if decoded <= resident_gib * 2**30:
        return ResidentImages.read(dataset, device, threads, split)
    return StreamedImages.open(dataset, device, threads, split)
