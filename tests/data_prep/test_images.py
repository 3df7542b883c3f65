from __future__ import annotations

import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.images import Geometry, decode_image


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_lossless_pixels_come_back(rng, encode_image, tmp_path):
    pixels = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    for fmt in ("PNG", "BMP"):
        decoded = decode_image(encode_image(pixels, fmt), where="x")
        assert (decoded == pixels).all()
        assert decoded.flags.c_contiguous
    path = tmp_path / "x.png"
    path.write_bytes(encode_image(pixels))
    assert (decode_image(path, where="x") == pixels).all()


def test_grayscale_palette_and_alpha_become_rgb(rng, encode_image):
    gray = rng.integers(0, 256, (5, 6), dtype=np.uint8)
    assert (decode_image(encode_image(gray), where="x") == gray[:, :, None]).all()
    rgba = rng.integers(0, 256, (5, 6, 4), dtype=np.uint8)
    rgba[:, :, 3] = 255
    assert (decode_image(encode_image(rgba), where="x") == rgba[:, :, :3]).all()
    palette = Image.fromarray(gray).convert("P")
    palette.putpalette([value for grey in range(256) for value in (grey, 0, 255 - grey)])
    decoded = decode_image(encode_image(np.zeros((1, 1), np.uint8)), where="x")
    assert decoded.shape == (1, 1, 3)


def converted(data: bytes, geometry: Geometry | None = None) -> tuple[np.ndarray, dict[str, int]]:
    counted = Counter[str]()
    return decode_image(data, where="x", geometry=geometry, conversions=counted), dict(counted)


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "QOI", "JPEG2000", "ICO"])
def test_lossless_formats(fmt, rng, encode_image):
    pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    decoded, done = converted(encode_image(pixels, fmt))
    assert (decoded == pixels).all()
    assert not done


def test_transparent_pixels_lie_over_the_background(rng, encode_image):
    rgba = rng.integers(0, 256, (5, 6, 4), dtype=np.uint8)
    share = rgba[:, :, 3:] / 255
    for background, level in (("white", 255), ("black", 0)):
        decoded, done = converted(encode_image(rgba), Geometry(background=background))
        assert np.abs(decoded - (rgba[:, :, :3] * share + level * (1 - share))).max() <= 1
        assert done == {f"alpha over {background}": 1}


def test_16_bits_are_scaled(encode_image):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    decoded, done = converted(encode_image(levels))
    assert (decoded[:, :, 0] == np.round(levels / 257)).all()
    assert done == {"16 bits to 8": 1, "grayscale": 1}


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(fmt, orientation, encode_image):
    """As the tag is defined: which corner and side of the picture the first row and column are."""
    y, x = np.mgrid[0:32, 0:48]
    upright = np.stack([5 * x, 7 * y, 0 * x], axis=2).astype(np.uint8)
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded, done = converted(encode_image(np.ascontiguousarray(turned[orientation]), fmt, exif=exif))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 6
    assert done == ({"EXIF rotation": 1} if orientation > 1 else {})


def test_damaged_exif_is_no_rotation(encode_image):
    exif = b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xaa" * 40
    assert converted(encode_image(np.zeros((4, 4, 3), np.uint8), "JPEG", exif=exif))[0].shape == (4, 4, 3)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P", "1", "LA"])
def test_conversions_are_counted(mode, rng):
    stream = io.BytesIO()
    source = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).convert(mode)
    source.save(stream, "TIFF")
    decoded, done = converted(stream.getvalue())
    assert (decoded == np.asarray(source.convert("RGB"))).all()
    assert done == {{"P": "palette", "1": "grayscale", "LA": "grayscale"}.get(mode, mode): 1}


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames(fmt, encode_image):
    frames = [np.full((8, 8, 3), level, np.uint8) for level in (200, 20)]
    data = encode_image(frames[0], fmt, save_all=True, append_images=[Image.fromarray(frames[1])])
    decoded, done = converted(data)
    assert np.abs(decoded.astype(int) - 200).max() < 4
    assert done["first of several frames"] == 1


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("after", [False, True])
def test_long_texts_and_profiles_of_a_png(kind, after, rng, encode_image):
    pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    whole = encode_image(pixels)
    at = len(whole) - 12 if after else 33
    content = {b"iTXt": b"XML\0\1\0\0\0"}.get(kind, b"x\0\0") + zlib.compress(bytes(3 << 20))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    assert (decode_image(whole[:at] + chunk + whole[at:], where="x") == pixels).all()


def test_fits(encode_image):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 100
    padded, _ = converted(encode_image(wide), Geometry(crop_px=8, fit="pad"))
    assert (padded[2:6] == wide).all()
    assert (padded[[0, 1, 6, 7]] == 255).all()
    black, _ = converted(encode_image(wide), Geometry(crop_px=4, fit="pad", background="black"))
    assert (black[[0, 3]] == 0).all()
    assert black[1, 0, 0] == 0
    assert black[1, 3, 0] == 100
    stretched, _ = converted(encode_image(wide), Geometry(crop_px=8, fit="stretch"))
    assert (stretched[:, :3] == 0).all()
    assert (stretched[:, 5:] == 100).all()
    thin = encode_image(np.zeros((1, 9000, 3), np.uint8))
    assert converted(thin, Geometry(crop_px=8, fit="pad"))[0].shape == (8, 8, 3)


def test_crop_without_resizing_is_exact(rng, encode_image):
    pixels = rng.integers(0, 256, (10, 16, 3), dtype=np.uint8)
    decoded = decode_image(encode_image(pixels), where="x", geometry=Geometry(resize_px=10, crop_px=6))
    assert (decoded == pixels[2:8, 5:11]).all()


@pytest.mark.parametrize(("height", "width"), [(60, 60), (90, 60), (60, 200), (61, 97)])
def test_resize_and_crop_agree_with_doing_one_after_the_other(height, width, encode_image):
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), x + y], axis=2)
    pixels = smooth.clip(0, 255).astype(np.uint8)
    decoded = decode_image(encode_image(pixels), where="x", geometry=Geometry(resize_px=32, crop_px=28))
    scale = 32 / min(height, width)
    resized = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - 28) // 2, (resized.height - 28) // 2
    oracle = np.asarray(resized.crop((left, top, left + 28, top + 28))).astype(int)
    assert decoded.shape == (28, 28, 3)
    # half a pixel of difference in the crop's place, where sizes are odd
    assert np.abs(decoded.astype(int) - oracle).mean() < (0.1 if (height, width) == (60, 60) else 5)


def test_a_thin_image_is_not_blown_up(encode_image):
    thin = encode_image(np.zeros((1, 60_000, 3), dtype=np.uint8))
    assert decode_image(thin, where="x", geometry=Geometry(resize_px=256, crop_px=224)).shape == (224, 224, 3)


def bad_files(encode_image, rng) -> dict[str, tuple[bytes, str]]:
    jpeg = encode_image(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), "JPEG")
    png = encode_image(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    deep = encode_image(np.zeros((4, 4), np.float32), "TIFF")
    return {
        "empty": (b"", "empty"),
        "text": (b"hello, this is no image", "not an image"),
        "postscript": (encode_image(np.zeros((4, 4), np.uint8), "EPS"), "not an image"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half a png": (png[: len(png) // 2], "truncated"),
        "header only": (jpeg[:30], "image"),
        "bomb": (png_of_size(30_000, 30_000), "too many pixels"),
        "smaller bomb": (png_of_size(9_000, 9_000), "9000 x 9000"),
        "float": (deep, "32 bits"),
        "png without pixels": (png_of_size(50, 5000), "image"),
    }


def test_bad_files_are_named_with_a_reason(encode_image, rng):
    for name, (data, says) in bad_files(encode_image, rng).items():
        with pytest.raises(UserError, match=says) as error:
            decode_image(data, where=f"folder/{name}")
        assert error.value.where == f"folder/{name}"
        assert error.value.expected


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        decode_image(tmp_path / "gone.png", where="gone.png")


def test_no_damage_gets_anything_but_an_image_or_a_user_error(encode_image, rng):
    whole = encode_image(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8), "JPEG")
    failed = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), 4):
            damaged[position] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged), where="x").ndim == 3
        except UserError:
            failed += 1
    assert failed > 10
