from __future__ import annotations

import struct
import zlib

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
    assert (decode_image(encode_image(rgba), where="x") == rgba[:, :, :3]).all()
    palette = Image.fromarray(gray).convert("P")
    palette.putpalette([value for grey in range(256) for value in (grey, 0, 255 - grey)])
    decoded = decode_image(encode_image(np.zeros((1, 1), np.uint8)), where="x")
    assert decoded.shape == (1, 1, 3)


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
    deep = encode_image(rng.integers(0, 2**16, (4, 4), dtype=np.uint16))
    return {
        "empty": (b"", "empty"),
        "text": (b"hello, this is no image", "not an image"),
        "gif": (encode_image(np.zeros((4, 4), np.uint8), "GIF"), "not an image"),
        "half a jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half a png": (png[: len(png) // 2], "truncated"),
        "header only": (jpeg[:30], "image"),
        "bomb": (png_of_size(30_000, 30_000), "too many pixels"),
        "smaller bomb": (png_of_size(9_000, 9_000), "9000 x 9000"),
        "16 bit": (deep, "8 bits"),
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
