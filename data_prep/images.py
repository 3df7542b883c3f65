"""One image file's bytes to RGB pixels, for files that nothing has checked."""

from __future__ import annotations

import functools
import io
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from data_prep.errors import UserError
from data_prep.io import limits

Fit = Literal["crop", "pad", "stretch"]
Background = Literal["white", "black"]

ALLOWED = "a whole image file: JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, or another that Pillow reads"

_USUAL = ("JPEG", "PNG", "GIF", "BMP", "PPM")  # what Pillow knows without importing all of its plugins
_REFUSED = (
    "EPS",
    "WMF",
    "BUFR",
    "GRIB",
    "HDF5",
    "MPEG",
)  # EPS runs Ghostscript; Pillow cannot decode the others itself

# Pillow warns where it does not refuse; `limits.IMAGE_PIXELS` is below both, and a warning would be a second message.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of tags that are not used here

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # EXIF's tag, and TIFF's
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_KINDS = {"1": "grayscale", "L": "grayscale", "LA": "grayscale", "La": "grayscale", "P": "palette", "PA": "palette"}


@dataclass(frozen=True)
class Geometry:
    """How a decoded image becomes square; without crop_px it stays as it is."""

    resize_px: int | None = None
    """The shorter side is resized to this many pixels (bilinear, antialiased); for fit crop."""
    crop_px: int | None = None
    """Side of the square."""
    fit: Fit = "crop"
    """crop: the central square is kept. pad: the longer side is resized to the square's, and the rest filled with the
    background. stretch: both sides are resized to it."""
    background: Background = "white"
    """Colour of what is filled, and of what lies behind transparent pixels."""

    def apply(self, image: Image.Image) -> Image.Image:
        """An RGB image as a square.

        Resizing and cropping are one step: the long side of a thin image is never blown up only to be cropped away.
        """
        if self.crop_px is None:
            return image
        square, shorter, longer = (self.crop_px, self.crop_px), min(image.size), max(image.size)
        if self.fit == "stretch":
            return image if image.size == square else image.resize(square, Image.Resampling.BILINEAR)
        if self.fit == "pad":
            width, height = (max(1, round(side * self.crop_px / longer)) for side in image.size)
            small = image if longer == self.crop_px else image.resize((width, height), Image.Resampling.BILINEAR)
            padded = Image.new("RGB", square, self.background)
            padded.paste(small, ((self.crop_px - small.width) // 2, (self.crop_px - small.height) // 2))
            return padded
        side = shorter * self.crop_px / (self.resize_px or self.crop_px)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        if side == self.crop_px and left.is_integer() and top.is_integer():
            return image.crop((int(left), int(top), int(left + side), int(top + side)))
        return image.resize(square, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


_AS_IT_IS = Geometry()


def decode_image(
    data: bytes | Path,
    *,
    where: str,
    geometry: Geometry | None = None,
    opaque: bool = False,
    what: str = "image",
    conversions: Counter[str] | None = None,
) -> np.ndarray:
    """Decode a whole image to RGB, the first one where a file holds several.

    Grayscale, palette and CMYK images are converted, 16 bits scaled to 8, transparent pixels laid over the background,
    and EXIF rotation is applied. Text and colour profiles of a PNG are not read at all.

    Args:
        data: the bytes of an image file, or its path.
        where: names the image in errors.
        geometry: resize and crop; background.
        opaque: refuse transparent pixels.
        what: the image is called in errors.
        conversions: what was done to the image is counted here.

    Returns:
        uint8 (H, W, 3), C-contiguous.

    Raises:
        UserError: missing, empty, truncated or foreign file, more than `limits.IMAGE_PIXELS` pixels, 32-bit or float
            pixels.
    """
    try:
        if isinstance(data, Path):
            data = limits.read_limited(data, limits.IMAGE_FILE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the {what} ({error.strerror})", where=where) from error
    if not data:
        raise UserError(f"the {what} file is empty", where=where, expected=ALLOWED)
    geometry, done = geometry or _AS_IT_IS, []
    try:
        with _open(io.BytesIO(_without_comments(data) if data.startswith(_PNG) else data)) as image:
            _check(image, where=where, what=what)
            rgb = _rgb(image, geometry.background, done)
            if opaque and any(kind.startswith("alpha") for kind in done):
                raise UserError(
                    f"the {what} has an alpha channel", where=where, expected="an opaque image",
                    hint="lay it over a colour first, in any image editor",
                )  # fmt: skip
            pixels = np.array(geometry.apply(rgb), dtype=np.uint8)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError("not an image that can be read", where=where, expected=ALLOWED) from error
    except Image.DecompressionBombError as error:
        most = f"at most {limits.IMAGE_PIXELS:,} pixels"
        raise UserError(f"the {what} declares too many pixels ({error})", where=where, expected=most) from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise UserError(f"damaged or truncated {what} ({error})", where=where, expected=ALLOWED) from error
    if conversions is not None:
        conversions.update(done)
    return pixels


def _open(file: io.BytesIO) -> Any:
    try:
        return Image.open(file, formats=_USUAL)
    except Image.UnidentifiedImageError:
        return Image.open(file, formats=readable_formats())


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of all formats that are read, those of its plugins that are installed included."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _REFUSED)


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """What names of files in these formats end with, in lower case, with the dot."""
    formats = readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def _without_comments(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile, which Pillow refuses where they are long."""
    kept, at, dropped = [data[:8]], 8, False
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
        if data[at + 4 : at + 8] in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            dropped = True
        else:
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if dropped else data


def _check(image: Image.Image, *, where: str, what: str) -> None:
    """What an image file's header must say.

    Raises:
        UserError: too many pixels, or pixels that RGB does not hold.
    """
    width, height = image.size
    if width * height > limits.IMAGE_PIXELS:
        most = f"at most {limits.IMAGE_PIXELS:,} pixels"
        raise UserError(f"the {what} declares {width} x {height} pixels", where=where, expected=most)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # whose range nobody knows
        bits = f"the {what} has 32 bits a channel (mode {image.mode})"
        raise UserError(bits, where=where, expected="8 or 16 bits a channel", hint="scale it to 8 bits")


def _rgb(image: Any, background: Background, done: list[str]) -> Image.Image:
    """An opened image as RGB, the right way up; what was done to it goes to the end of `done`."""
    if image.format == "JPEG" and image.mode == "RGB" and "exif" not in image.info:  # most images: nothing to do
        image.load()
        return image
    deep, turn, kind = _is_deep(image), _orientation(image), image.format
    if getattr(image, "is_animated", False):
        done.append("first of several frames")
    image.load()
    if deep:
        done.append("16 bits to 8")
    if image.mode.startswith("I"):  # levels 0 to 65535, which Pillow would clip
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode != "RGB":
        done.append(_KINDS.get(image.mode, image.mode if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else ""))
    if "A" in image.getbands() or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema()[0] < 255:
            done.append(f"alpha over {background}")
            layer = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
        image = layer.convert("RGB")
    elif image.mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    elif image.mode != "RGB":
        image = image.convert("RGB")
    if turn in _TURNS:
        done.append("EXIF rotation")
        if kind != "TIFF":  # Pillow turns these itself
            image = image.transpose(_TURNS[turn])
    done[:] = filter(None, done)
    return image


def _is_deep(image: Any) -> bool:
    """Has an opened image more than 8 bits a channel? Pillow keeps the upper 8 of those in colour without a word."""
    if image.format == "PNG":
        return image.mode.startswith("I") or any(";16" in str(tile.args) for tile in image.tile)
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, 8)  # BitsPerSample
        return max(bits if isinstance(bits, tuple) else (bits,)) > 8
    if image.format == "PPM":
        return image.mode == "I" or any(isinstance(t.args, tuple) and t.args[-1] > 255 for t in image.tile)
    return image.mode.startswith("I")


def _orientation(image: Any) -> int:
    """EXIF's orientation, 1 where there is none or it is damaged."""
    if image.format != "TIFF" and "exif" not in image.info:
        return 1
    try:
        value = image.tag_v2.get(_ORIENTATION, 1) if image.format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow makes of damaged tags: the pixels are whole
        return 1
    return value if isinstance(value, int) else 1
