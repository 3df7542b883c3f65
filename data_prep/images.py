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


def decode_image(data: bytes | Path, *, where: str, geometry: Geometry | None = None) -> np.ndarray:
    """Decode a whole image to RGB.

    Grayscale, palette and CMYK images are converted; an alpha channel is dropped and EXIF rotation is not
    applied, as in torchvision's folder loader.

    Args:
        data: the bytes of an image file, or its path.
        where: names the image in errors.
        geometry: resize and crop.

    Returns:
        uint8 (H, W, 3), C-contiguous.

    Raises:
        UserError: missing, empty, truncated or foreign file, more than `limits.IMAGE_PIXELS` pixels, 16-bit or float
            pixels.
    """
    if isinstance(data, Path):
        try:
            data = limits.read_limited(data, limits.IMAGE_FILE_BYTES)
        except OSError as error:
            raise UserError(f"cannot read the image ({error.strerror})", where=where) from error
    if not data:
        raise UserError("the image file is empty", where=where, expected=_allowed())
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.IMAGE_PIXELS:
                raise UserError(
                    f"the image declares {width} x {height} pixels",
                    where=where,
                    expected=f"at most {limits.IMAGE_PIXELS:,} pixels",
                )
            if image.mode.startswith(_DEEP_MODES):
                raise UserError(
                    f"the image has more than 8 bits a channel (mode {image.mode})",
                    where=where,
                    expected="8 bits a channel",
                )
            image.load()
            rgb = image if image.mode == "RGB" else image.convert("RGB")
            return np.array((geometry or Geometry()).apply(rgb), dtype=np.uint8)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image that can be read", where=where, expected=_allowed()) from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"the image declares too many pixels ({error})",
            where=where,
            expected=f"at most {limits.IMAGE_PIXELS:,} pixels",
        ) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"damaged or truncated image ({error})", where=where, expected=_allowed()) from error


def read_opaque_image(path: Path) -> Image.Image:
    """A trigger's image file as RGB.

    Raises:
        UserError: unreadable, or with an alpha channel, whose meaning in a trigger would be a guess.
    """
    where = str(path)
    try:
        data = limits.read_limited(path, limits.IMAGE_FILE_BYTES)
        if not data:
            raise UserError("the trigger image is empty", where=where, expected=_allowed())
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if "A" in image.getbands() or "transparency" in image.info:
                raise UserError("the trigger image has an alpha channel", where=where, expected="an opaque image")
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image that can be read", where=where, expected=_allowed()) from error
    except OSError as error:
        raise UserError(f"cannot read the trigger image ({error})", where=where, expected=_allowed()) from error
    except Exception as error:
        raise UserError(f"damaged trigger image ({error})", where=where, expected=_allowed()) from error
    return Image.fromarray(decode_image(data, where=where))


def _allowed() -> str:
    return f"a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
