"""The suspects: training images whose labels the filter dropped, highest loss first."""

from __future__ import annotations

import base64
import io

import numpy as np
from markupsafe import Markup

from dbd_dist.reporting.arrays import Split
from dbd_dist.reporting.data import Data, read_images

SHOWN = 24
_WIDEST_PX = 128  # larger images are scaled down: two dozen photographs would make a page of megabytes


def suspects(split: Split, limit: int = SHOWN) -> np.ndarray:
    """Indices of the samples that were not kept, highest loss first; equal losses by index."""
    dropped = np.flatnonzero(~split.kept)
    return dropped[np.argsort(-split.loss[dropped], kind="stable")][:limit]


def png_uri(image: np.ndarray) -> Markup:
    """An image uint8 (H, W, 3) as a data URI, pixel for pixel where it is small."""
    from PIL import Image

    picture = Image.fromarray(image)
    if max(picture.size) > _WIDEST_PX:
        picture.thumbnail((_WIDEST_PX, _WIDEST_PX))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"))


def gallery(data: Data, split: Split) -> list[tuple[int, Markup]]:
    """Index and data URI of the suspects, highest loss first; empty where the filter kept every label.

    Raises:
        UserError: the images cannot be read.
    """
    index = suspects(split)
    images = read_images(data, index) if len(index) else ()
    return [(int(i), png_uri(image)) for i, image in zip(index, images, strict=True)]


def summary(data: Data, split: Split) -> str:
    """How many of the suspects are poisoned, in a sentence."""
    if data.truth is None:
        return "It is not known which of them are poisoned: the data set came without truth."
    poisoned = data.truth.poisoned
    total, index = int(poisoned.sum()), suspects(split)
    if total == 0:
        return "The data carries no attack: these are the images that are hardest to classify."
    found, as_many = int(poisoned[index].sum()), int(poisoned[suspects(split, total)].sum())
    return (
        f"{found} of these {len(index)} are poisoned. Of the {total:,} images with the highest loss, as many as there "
        f"are poisoned ones, {as_many:,} are."
    )
