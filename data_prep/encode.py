"""One split to its .beton files and their content hashes, decoded once on several threads."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from data_prep.attacks.attack import Trigger
from data_prep.beton import BetonWriter
from data_prep.beton.jpeg import decode_jpeg, encode_jpeg
from data_prep.errors import UserError
from data_prep.io.hashes import ContentHash
from data_prep.progress import Progress
from data_prep.sources.split import Encoded, Split
from data_prep.threads import ordered_map

_CHUNK_BYTES = 4 << 20  # of decoded pixels: what one thread works on at a time
_CHUNK_IMAGES = 512

T = TypeVar("T")


@dataclass(frozen=True)
class EncodedSplit(Generic[T]):
    """What `encode_split` wrote."""

    content_hash: dict[str, str]
    """By file, see `data_prep.io.hashes.ContentHash`."""
    squared_error: int
    """What is decoded against what was given, summed over all values of all files."""
    seen: list[T]
    """What `look` returned, in order."""
    conversions: Counter[str]
    """How many images were converted, by what was done to them; an image of several kinds counts in each."""


def encode_split(
    split: Split,
    files: Mapping[Path, Trigger | None],
    labels: np.ndarray,
    *,
    px: int,
    quality: int | None,
    threads: int,
    watch: np.ndarray,
    look: Callable[[np.ndarray, list[np.ndarray], list[np.ndarray]], T],
    title: str,
    progress: bool,
) -> EncodedSplit[T]:
    """Write a split, once for each trigger.

    Args:
        split: to be decoded.
        files: to write, and what is done to the images of each.
        labels: int64 (n,), as the files give them.
        px: side of the images.
        quality: of JPEG; None stores raw pixels.
        threads: that decode and encode.
        watch: positions of the images that `look` is shown.
        look: is called on one of the threads with those of a chunk that holds any, uint8 (b, H, W, 3): as they were,
            with each file's trigger, and as each file holds them.
        title: of the progress.
        progress: show it on stderr.

    Raises:
        UserError: an image that cannot be decoded or has another size; no room.
    """

    def make(
        chunk: list[tuple[int, Encoded]],
    ) -> tuple[np.ndarray, list[tuple[Any, np.ndarray, int]], list[T], Counter]:
        index, converted = np.array([i for i, _ in chunk]), Counter[str]()
        clean = np.stack([_decode(split, i, encoded, px, converted) for i, encoded in chunk])
        triggered = [clean if trigger is None else trigger(clean, index) for trigger in files.values()]
        stored = [_store(images, quality) for images in triggered]
        shown, looked = np.isin(index, watch), []
        if shown.any():
            looked = [look(clean[shown], [i[shown] for i in triggered], [s[1][shown] for s in stored])]
        return index, stored, looked, converted

    shape: dict[str, Any] = {"count": len(split), "height_px": px, "width_px": px, "jpeg": quality is not None}
    digests, squared_error, seen, done = [ContentHash(px) for _ in files], 0, [], Counter[str]()
    with ExitStack() as stack:
        writers = [stack.enter_context(BetonWriter(path, **shape)) for path in files]
        bar = stack.enter_context(Progress(title, len(split), show=progress))
        for index, versions, looked, converted in ordered_map(make, _chunks(split, px), workers=threads):
            for writer, digest, (data, pixels, error) in zip(writers, digests, versions):
                writer.write(data, labels[index])
                digest.update(pixels, labels[index])
                squared_error += error
            seen += looked
            done += converted
            bar.add(len(index))
    hashes = {path.name: digest.hexdigest() for path, digest in zip(files, digests)}
    return EncodedSplit(hashes, squared_error, seen, done)


def readable(split: Split, px: int, *, threads: int, title: str, progress: bool) -> tuple[Split, list[str]]:
    """Decode a split, and keep what can be decoded; says what was left out and why."""

    def check(chunk: list[tuple[int, Encoded]]) -> tuple[int, list[tuple[int, str]]]:
        bad = []
        for i, encoded in chunk:
            try:
                split.decode(encoded, i)
            except UserError as error:
                bad.append((i, error.what))
        return len(chunk), bad

    good, skipped = np.ones(len(split), dtype=bool), []
    with Progress(title, len(split), show=progress) as bar:
        for count, bad in ordered_map(check, _chunks(split, px), workers=threads):
            for i, what in bad:
                good[i] = False
                skipped.append(f"{split.origin(i)}: {what}")
            bar.add(count)
    return split.take(good), skipped


def _store(images: np.ndarray, quality: int | None) -> tuple[np.ndarray | list[bytes], np.ndarray, int]:
    """What a file holds of images uint8 (b, H, W, 3), what is decoded from that, and the squared error between."""
    if quality is None:
        return images, images, 0
    height, width = images.shape[1:3]
    data = [encode_jpeg(image, quality) for image in images]
    pixels = np.stack([decode_jpeg(d, height_px=height, width_px=width) for d in data])
    return data, pixels, int(np.square(pixels.astype(np.int32) - images).sum())


def psnr_db(squared_error: int, values: int) -> float | None:
    """PSNR of `values` grey levels with that sum of squared errors; None where there is none."""
    return round(10 * float(np.log10(255**2 * values / squared_error)), 3) if squared_error else None


def _chunks(split: Split, px: int) -> Iterator[list[tuple[int, Encoded]]]:
    """The split's images with their positions, encoded, in lists of a few megabytes when decoded."""
    size = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // (px * px * 3)))
    stream = enumerate(split.stream())
    while chunk := list(itertools.islice(stream, size)):
        yield chunk


def _decode(split: Split, i: int, encoded: Encoded, px: int, conversions: Counter[str]) -> np.ndarray:
    image = split.decode(encoded, i, conversions)
    if image.shape != (px, px, 3):
        raise UserError(
            f"an image of {image.shape[1]} x {image.shape[0]} px among images of {px} x {px} px",
            where=split.origin(i),
            hint="give image_px, to make all images squares of one size, and --fit, to say how (crop, pad or stretch)",
        )
    return image
