"""The suspects: training images whose labels the filter dropped, highest loss first."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from markupsafe import Markup

from data_prep.errors import UserError
from dbd_dist.reporting.arrays import Split
from dbd_dist.reporting.data import Data, read_images

SHOWN = 24
_SHEET_PX = 2000  # `trigger_sheet` makes none larger
_WIDEST_PX = 128  # larger images are scaled down: two dozen photographs would make a page of megabytes


def suspects(split: Split, limit: int = SHOWN) -> np.ndarray:
    """Indices of the samples that were not kept, highest loss first; equal losses by index."""
    dropped = np.flatnonzero(~split.kept)
    return dropped[np.argsort(-split.loss[dropped], kind="stable")][:limit]


def png_uri(image: np.ndarray, widest_px: int = _WIDEST_PX) -> Markup:
    """An image uint8 (H, W, 3) as a data URI, pixel for pixel where it is small."""
    from PIL import Image

    picture = Image.fromarray(image)
    if max(picture.size) > widest_px:
        picture.thumbnail((widest_px, widest_px))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"))


def triggers(folder: Path) -> Markup | None:
    """The picture of the triggers that a method found, drawn anew; None where there is none.

    Raises:
        UserError: it is no picture, or larger than one can be.
    """
    from PIL import Image

    path = folder / "triggers.png"
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=("PNG",)) as picture:
            if max(picture.size) > _SHEET_PX:
                raise ValueError(f"{picture.width} x {picture.height} px")
            return png_uri(np.asarray(picture.convert("RGB")), _SHEET_PX)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"not a picture of triggers ({error})", where=path, hint="delete it") from error


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
