"""One image file's bytes to RGB pixels, for files that nothing has checked."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.errors import UserError
from data_prep.io import limits

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

# Pillow warns where it does not refuse; `limits.IMAGE_PIXELS` is below both, and a warning would be a second message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of tags that are not used here

_DEEP_MODES = ("I", "F")  # Pillow clips these to 0-255 instead of scaling them


@dataclass(frozen=True)
class Geometry:
    """How a decoded image becomes square; both None keep it as it is."""

    resize_px: int | None = None
    """The shorter side is resized to this many pixels (bilinear, antialiased)."""
    crop_px: int | None = None
    """Then the central square of this many pixels is kept."""

    def apply(self, image: Image.Image) -> Image.Image:
        """Resize and centre crop in one step: the long side of a thin image is never blown up only to be
        cropped away."""
        if self.crop_px is None:
            return image
        shorter = min(image.size)
        side = shorter * self.crop_px / (self.resize_px or self.crop_px)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        if side == self.crop_px and left.is_integer() and top.is_integer():
            return image.crop((int(left), int(top), int(left + side), int(top + side)))
        return image.resize(
            (self.crop_px, self.crop_px), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )


def decode_image(
    data: bytes | Path, *, where: str, geometry: Geometry | None = None, opaque: bool = False, what: str = "image"
) -> np.ndarray:
    """Decode a whole image to RGB.

    Grayscale, palette and CMYK images are converted; an alpha channel is dropped and EXIF rotation is not
    applied, as in torchvision's folder loader.

    Args:
        data: the bytes of an image file, or its path.
        where: names the image in errors.
        geometry: resize and crop.
        opaque: refuse an alpha channel.
        what: the image is called in errors.

    Returns:
        uint8 (H, W, 3), C-contiguous.

    Raises:
        UserError: missing, empty, truncated or foreign file, more than `limits.IMAGE_PIXELS` pixels, 16-bit or float
            pixels.
    """
    allowed = f"a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    try:
        if isinstance(data, Path):
            data = limits.read_limited(data, limits.IMAGE_FILE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the {what} ({error.strerror})", where=where) from error
    if not data:
        raise UserError(f"the {what} file is empty", where=where, expected=allowed)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, opaque=opaque, where=where, what=what)
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.array((geometry or Geometry()).apply(rgb), dtype=np.uint8)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image that can be read", where=where, expected=allowed) from error
    except Image.DecompressionBombError as error:
        most = f"at most {limits.IMAGE_PIXELS:,} pixels"
        raise UserError(f"the {what} declares too many pixels ({error})", where=where, expected=most) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"damaged or truncated {what} ({error})", where=where, expected=allowed) from error


def _check(image: Image.Image, *, opaque: bool, where: str, what: str) -> None:
    """What an image file's header must say.

    Raises:
        UserError: too many pixels, pixels that RGB does not hold, or an alpha channel where none may be.
    """
    width, height = image.size
    if width * height > limits.IMAGE_PIXELS:
        most = f"at most {limits.IMAGE_PIXELS:,} pixels"
        raise UserError(f"the {what} declares {width} x {height} pixels", where=where, expected=most)
    if image.mode.startswith(_DEEP_MODES):
        bits = f"the {what} has more than 8 bits a channel (mode {image.mode})"
        raise UserError(bits, where=where, expected="8 bits a channel")
    if opaque and ("A" in image.getbands() or "transparency" in image.info):
        raise UserError(f"the {what} has an alpha channel", where=where, expected="an opaque image")
