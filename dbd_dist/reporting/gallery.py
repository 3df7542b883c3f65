"""The suspects: training images whose labels the filter dropped, highest loss first."""

from __future__ import annotations

import base64
import io

import numpy as np

from dbd_dist.reporting.runs import Data, Split, read_images
from dbd_dist.reporting.wording import escaped

SHOWN = 24
_WIDEST_PX = 128  # larger images are scaled down: two dozen photographs would make a page of megabytes


def suspects(split: Split, limit: int = SHOWN) -> np.ndarray:
    """Indices of the samples that were not kept, highest loss first; equal losses by index."""
    dropped = np.flatnonzero(~split.kept)
    return dropped[np.argsort(-split.loss[dropped], kind="stable")][:limit]


def png_uri(image: np.ndarray) -> str:
    """An image uint8 (H, W, 3) as a data URI, pixel for pixel where it is small."""
    from PIL import Image

    picture = Image.fromarray(image)
    if max(picture.size) > _WIDEST_PX:
        picture.thumbnail((_WIDEST_PX, _WIDEST_PX))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def as_html(data: Data, split: Split) -> str:
    """A list of the suspects, and a sentence on how many of them are poisoned.

    Raises:
        UserError: the images cannot be read.
    """
    index = suspects(split)
    if len(index) == 0:
        return "<p>The filter kept every label.</p>"
    images = read_images(data, index)
    items = "".join(_item(data, split, int(i), image) for i, image in zip(index, images, strict=True))
    return f'{_summary(data, split, index)}<ol class="suspects">{items}</ol>'


def _summary(data: Data, split: Split, index: np.ndarray) -> str:
    if data.truth is None:
        return "<p>Which of them are poisoned nobody knows: the data set came without truth.</p>"
    poisoned = data.truth.poisoned
    total = int(poisoned.sum())
    if total == 0:
        return "<p>The data carries no attack: these are the images that are hardest to tell by their looks.</p>"
    found = int(poisoned[index].sum())
    as_many = int(poisoned[suspects(split, total)].sum())
    return (
        f"<p>{found} of these {len(index)} are poisoned. Among the {total:,} images of the highest loss, as many as "
        f"there are poisoned ones, {as_many:,} are.</p>"
    )


def _item(data: Data, split: Split, i: int, image: np.ndarray) -> str:
    names, given = data.class_names, int(data.labels[i])
    lines = [f"<b>given: <bdi>{escaped(names[given], 40)}</bdi></b>"]
    kind, alt = "", f"Training image {i}, given label {names[given]}"
    if data.truth is not None:
        true, poisoned = int(data.truth.true_label[i]), bool(data.truth.poisoned[i])
        kind = "poisoned" if poisoned else "clean"
        flag = "✕ poisoned" if poisoned else "not poisoned"
        lines.append(f'true: <bdi>{escaped(names[true], 40)}</bdi><br><span class="flag">{flag}</span>')
        alt += f", true label {names[true]}, {'poisoned' if poisoned else 'not poisoned'}"
    lines.append(f'<span class="from">loss {split.loss[i]:.2f}<br><bdi>{escaped(data.origins[i], 90)}</bdi></span>')
    return f'<li class="{kind}"><img src="{png_uri(image)}" alt="{escaped(alt, 160)}">{"".join(lines)}</li>'
