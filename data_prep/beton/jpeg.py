"""JPEG as .beton files hold it: full chroma resolution (4:4:4), Huffman tables made for each image.

Written by Pillow. Pillow and TurboJPEG give the same pixels for it: both are libjpeg-turbo with its accurate integer
DCT, whose result is laid down bit by bit. FFCV's own call asks for the fast DCT instead, whose pixels differ.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

QUALITY = 95
"""On libjpeg's scale of 1 to 100. What it leaves of subtle triggers (Blended, WaNet): docs/design.md."""
SUBSAMPLING = "4:4:4"


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """The bytes of a JPEG file of pixels uint8 (H, W, 3)."""
    picture = Image.fromarray(image)

    def save(*, optimize: bool) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=quality, subsampling=SUBSAMPLING, optimize=optimize)
        return buffer.getvalue()

    try:
        # a fifth smaller, for twice the time to encode and none to decode
        return save(optimize=True)
    except OSError:  # Pillow gives it a buffer of one or two bytes a pixel: noise does not fit
        return save(optimize=False)


def decode_jpeg(data: bytes, *, height_px: int, width_px: int) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a JPEG of this size.

    Damage that libjpeg only warns of passes, since Pillow does not tell: the manifest's sha256 has to find it.

    Raises:
        ValueError: not a whole colour JPEG, or of another size.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.size != (width_px, height_px) or image.mode != "RGB":
                raise ValueError(f"a JPEG of {image.width} x {image.height} px, mode {image.mode}")
            return np.array(image)
    except (OSError, SyntaxError) as error:  # Pillow's for damaged files
        raise ValueError(f"a damaged JPEG ({error})") from error
