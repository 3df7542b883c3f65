"""Images stored as JPEG: what is written, and that every reader decodes it to Pillow's pixels."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.attacks import BadNets
from data_prep.beton import BetonStream, BetonWriter, check_beton, read_beton, stream, write_beton
from data_prep.beton import format as layout
from data_prep.beton.jpeg import decode_jpeg, encode_jpeg
from data_prep.config import PrepareConfig
from data_prep.dataset.manifest import open_dataset
from data_prep.dataset.staging import stage
from data_prep.dataset.truth import read_truth
from data_prep.errors import UserError
from data_prep.io.hashes import content_hash
from data_prep.pipeline import prepare
from data_prep.sources import Digits, Parquet

COUNT, HEIGHT, WIDTH = 103, 24, 40
FIELD, FIELD_BYTES, SAMPLE_BYTES, REGION_BYTES = 24, 1041, 32, 24
SAMPLES = FIELD + 3 * FIELD_BYTES


def pictures(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Colours that change slowly, with a patch of noise: edges and chroma that a JPEG must lose something of."""
    draws = np.random.default_rng(count)
    coarse = draws.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(c).resize((width, height))) for c in coarse])
    images[:, :8, -8:] = draws.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)[:, :height, :width]
    return images


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def compressed(image: np.ndarray, quality: int = 95) -> bytes:
    """By the book: 4:4:4, and optimised tables where Pillow's buffer holds them: not for noise."""
    for optimize in (True, False):
        buffer = io.BytesIO()
        try:
            Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0, optimize=optimize)
            break
        except OSError:
            assert len(np.unique(image[..., 0])) == 256
    return buffer.getvalue()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return pictures(COUNT)


@pytest.fixture(scope="module")
def decoded(images) -> np.ndarray:
    return np.stack([pillow(compressed(image)) for image in images])


@pytest.fixture(scope="module")
def path(images, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("jpeg") / "x.beton"
    write_beton(file, images, np.arange(COUNT) * 3, jpeg_quality=95)
    return file


@pytest.fixture(params=["FFCV", "plain"])
def reader(request, monkeypatch) -> str:
    """Each of both ways to read."""
    if request.param == "plain":
        monkeypatch.setattr(stream, "ffcv_installed", lambda: False)
    return request.param


# -------------------------------------------------------------------------------- one image


@pytest.mark.parametrize("quality", [1, 75, 95, 100])
@pytest.mark.parametrize("px", [1, 7, 8, 33, 300])
def test_noise_of_any_size_and_quality(quality, px):
    noise = np.random.default_rng(px).integers(0, 256, (px, px + 2, 3), dtype=np.uint8)
    data = encode_jpeg(noise, quality)
    assert data == compressed(noise, quality)
    np.testing.assert_array_equal(decode_jpeg(data, height_px=px, width_px=px + 2), pillow(data))


def test_other_files_and_sizes_are_refused(images):
    data = encode_jpeg(images[0], 95)
    with pytest.raises(ValueError, match="40 x 24"):
        decode_jpeg(data, height_px=24, width_px=41)
    gray = io.BytesIO()
    Image.fromarray(images[0][..., 0]).save(gray, "JPEG")
    png = io.BytesIO()
    Image.fromarray(images[0]).save(png, "PNG")
    for other in (gray.getvalue(), png.getvalue(), data[:-40], data[:100], b"", b"\xff\xd8" + bytes(50)):
        with pytest.raises(ValueError, match="JPEG"):
            decode_jpeg(other, height_px=24, width_px=40)


# -------------------------------------------------------------------------------- files


def test_every_reader_gives_pillows_pixels(reader, path, images, decoded, within):
    for threads in (1, 3, 200):
        found, labels, index = within(lambda threads=threads: read_beton(path, threads=threads))
        np.testing.assert_array_equal(found, decoded)
        np.testing.assert_array_equal(labels, np.arange(COUNT) * 3)
        np.testing.assert_array_equal(index, np.arange(COUNT))
    assert (decoded != images).any()  # it is no raw file
    assert check_beton(path).jpeg


def test_any_order_on_threads(reader, path, decoded, within):
    order = np.random.default_rng(0).integers(0, COUNT, 250)
    with BetonStream(path, threads=3) as stream:
        for drop_last in (False, True):
            got = within(
                lambda last=drop_last: [
                    tuple(part.copy() for part in batch) for batch in stream.batches(order, 32, drop_last=last)
                ]
            )
            count = 224 if drop_last else 250
            assert [len(batch[0]) for batch in got] == [32] * 7 + [26] * (not drop_last)
            np.testing.assert_array_equal(np.concatenate([batch[0] for batch in got]), decoded[order[:count]])
            np.testing.assert_array_equal(np.concatenate([batch[1] for batch in got]), order[:count] * 3)


def test_a_raw_and_a_jpeg_file_at_once(path, decoded, images, tmp_path, within):
    write_beton(tmp_path / "raw.beton", images, np.arange(COUNT))

    def both():
        with BetonStream(path, threads=2) as first, BetonStream(tmp_path / "raw.beton") as second:
            order = np.arange(COUNT)
            for (a, _, index), (b, _, _) in zip(first.batches(order, 10), second.batches(order, 10), strict=True):
                np.testing.assert_array_equal(a, decoded[index])
                np.testing.assert_array_equal(b, images[index])

    within(both)


def test_stopping_early_and_going_on(reader, path, decoded, within):
    def some():
        with BetonStream(path, threads=2) as stream:
            for _ in range(3):
                passing = stream.batches(np.arange(COUNT), 10)
                np.testing.assert_array_equal(next(passing)[0], decoded[:10])
                passing.close()  # type: ignore[attr-defined]

    within(some)


# 60 noisy images of 224 px at quality 100 are more than a page of 8 MiB
@pytest.mark.parametrize(("count", "height", "width", "quality"), [(1, 8, 8, 95), (60, 224, 224, 100)])
def test_every_jpeg_is_where_the_tables_say(tmp_path, count, height, width, quality):
    noise = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    write_beton(tmp_path / "x.beton", noise, np.arange(count), jpeg_quality=quality)
    info, raw = check_beton(tmp_path / "x.beton"), (tmp_path / "x.beton").read_bytes()
    for image, start, size in zip(noise, info.data_ptr.tolist(), info.data_bytes.tolist(), strict=True):
        assert raw[start : start + size] == compressed(image, quality)


def test_a_file_of_ffcvs_own_jpegs(tmp_path, ffcv_writes, images, within):
    """Halved chroma, encoded by OpenCV: decoded as Pillow decodes it, not as FFCV does."""
    ffcv_writes(tmp_path / "x.beton", images, np.arange(COUNT), mode="jpg")
    info, raw = check_beton(tmp_path / "x.beton"), (tmp_path / "x.beton").read_bytes()
    expected = [pillow(raw[p : p + n]) for p, n in zip(info.data_ptr.tolist(), info.data_bytes.tolist(), strict=True)]
    found, _, _ = within(lambda: read_beton(tmp_path / "x.beton"))
    np.testing.assert_array_equal(found, np.stack(expected))


def test_what_a_writer_refuses(tmp_path, images, monkeypatch, files_below):
    for jpeg, given in ((False, [encode_jpeg(images[0], 95)]), (True, images[:1])):
        with (
            pytest.raises(ValueError, match="jpeg is"),
            BetonWriter(tmp_path / "x", count=1, height_px=HEIGHT, width_px=WIDTH, jpeg=jpeg) as writer,
        ):
            writer.write(given, np.zeros(1, dtype=np.int64))
    monkeypatch.setattr(layout, "MAX_PAGE", 2 << 20)
    with (
        pytest.raises(UserError, match="2,097,153 bytes does not fit"),
        BetonWriter(tmp_path / "x", count=1, height_px=HEIGHT, width_px=WIDTH, jpeg=True) as writer,
    ):
        writer.write([bytes((2 << 20) + 1)], np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="an image of shape"):
        write_beton(tmp_path / "x", [images[0], images[0][:8]], np.zeros(2), jpeg_quality=95)
    assert files_below(tmp_path) == []


# -------------------------------------------------------------------------------- damaged files


def put(offset: int, layout: str, value: int):
    def edit(raw: bytearray) -> None:
        struct.pack_into(layout, raw, offset, value)

    return edit


def in_regions(sample: int, offset: int, change):
    """Change a number of the region table, and of the sample table where it is the address."""

    def edit(raw: bytearray) -> None:
        (table,) = struct.unpack_from("<Q", raw, 16)
        at = table + sample * REGION_BYTES + offset
        value = change(*struct.unpack_from("<Q", raw, at))
        struct.pack_into("<Q", raw, at, value)
        if offset == 8:
            struct.pack_into("<Q", raw, SAMPLES + sample * SAMPLE_BYTES + 5, value)

    return edit


LAST = COUNT - 1
FAULTS = {
    "one raw": (put(SAMPLES + 2 * SAMPLE_BYTES, "<B", 1), "not all stored"),
    "first raw": (put(SAMPLES, "<B", 1), "not all stored"),
    "no mode": (put(SAMPLES, "<B", 7), "not all stored"),
    "no bytes": (in_regions(3, 16, lambda size: 0), "outside"),
    "a byte less": (in_regions(3, 16, lambda size: size - 1), "does not end"),
    "a byte more": (in_regions(3, 16, lambda size: size + 1), "over another's"),
    "the last a byte less": (in_regions(LAST, 16, lambda size: size - 1), "does not end"),
    "the last a byte more": (in_regions(LAST, 16, lambda size: size + 1), "does not end"),
    "the last beyond the data": (in_regions(LAST, 16, lambda size: 4 << 20), "outside"),
    "more than there is": (in_regions(3, 16, lambda size: 2**64 - 1), "outside"),
    "moved": (in_regions(3, 8, lambda ptr: ptr + 1), "over another's"),
    "at another": (in_regions(3, 8, lambda ptr: ptr - 700), "over another's"),
    "beyond the file": (in_regions(3, 8, lambda ptr: 2**64 - 100), "outside"),
    "in the tables": (in_regions(0, 8, lambda ptr: 100), "outside"),
    "in one table alone": (put(SAMPLES + 5, "<Q", 1 << 21 | 1), "does not match"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_tables_are_refused(name, path, tmp_path):
    edit, says = FAULTS[name]
    raw = bytearray(path.read_bytes())
    edit(raw)
    (tmp_path / "x.beton").write_bytes(raw)
    for read in (check_beton, read_beton, BetonStream):
        with pytest.raises(UserError, match=says) as error:
            read(tmp_path / "x.beton")
        assert error.value.where == tmp_path / "x.beton"


def test_every_byte_of_the_tables_counts(tmp_path, images):
    """As for raw files: all but labels, padding and FFCV's field arguments."""
    file = tmp_path / "x.beton"
    write_beton(file, images[:2], np.arange(2), jpeg_quality=95)
    whole = file.read_bytes()
    (table,) = struct.unpack_from("<Q", whole, 16)
    positions = list(range(24)) + list(range(table, table + 2 * REGION_BYTES))
    positions += [SAMPLES + s * SAMPLE_BYTES + i for s in range(2) for i in range(32) if not 13 <= i < 24]
    accepted = []
    for position in positions:
        raw = bytearray(whole)
        raw[position] ^= 0xFF
        file.write_bytes(raw)
        try:
            check_beton(file)
            accepted.append(position)
        except UserError:
            pass
    assert accepted == []


def harm(data: bytearray, name: str) -> None:
    """Damage a JPEG without changing its length."""
    if name == "zeros":
        data[:] = bytes(len(data))
    elif name == "no start":
        data[0] = 0
    elif name == "cut short":  # an end in the middle
        data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\xd9"
    else:  # another size in its own header
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", HEIGHT // 2, WIDTH // 2)


@pytest.mark.parametrize("name", ["zeros", "no start", "cut short", "other size"])
def test_a_damaged_image_is_an_error_of_the_consumer(reader, name, path, tmp_path, decoded, within):
    """What the manifest's sha256 would have found; not one wrong pixel comes out of FFCV."""
    info, raw = check_beton(path), bytearray(path.read_bytes())
    start, size = int(info.data_ptr[50]), int(info.data_bytes[50])
    data = raw[start : start + size]
    harm(data, name)
    raw[start : start + size] = data
    (tmp_path / "x.beton").write_bytes(raw)
    for threads in (1, 2):
        with BetonStream(tmp_path / "x.beton", threads=threads) as stream:
            if (reader, name) == ("plain", "cut short"):  # Pillow keeps libjpeg's warnings to itself
                assert len(within(lambda opened=stream: list(opened.batches(np.arange(COUNT), 10)))) == 11
                continue
            with pytest.raises(UserError, match="cannot be decoded") as error:
                within(lambda opened=stream: list(opened.batches(np.arange(COUNT), 10)))
            assert error.value.where == tmp_path / "x.beton"
            good = within(lambda opened=stream: next(opened.batches(np.arange(50), 50))[0].copy())
            np.testing.assert_array_equal(good, decoded[:50])


# -------------------------------------------------------------------------------- data sets


SOURCE = Digits(train_per_class=24, test_per_class=5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    config = PrepareConfig(
        source=SOURCE, attack=BadNets(), rate=0.1, encoding="jpeg", datasets=tmp_path_factory.mktemp("jpeg"), workers=2
    )
    return prepare(config, progress=False)


def test_a_data_set_is_the_raw_one_through_pillow(dataset, digits):
    """Trigger first, encoding after; everything else is that of the raw data set."""
    raw, manifest = open_dataset(digits), open_dataset(dataset.folder).manifest
    wrong = 0.0
    for split in ("train", "test", "test_triggered"):
        before, labels, _ = read_beton(raw.folder / f"{split}.beton")
        found, found_labels, _ = read_beton(dataset.folder / f"{split}.beton")
        expected = np.stack([pillow(compressed(image)) for image in before])
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_labels, labels)
        assert manifest.content_hash[split] == content_hash(expected, labels)
        if split == "train":
            wrong = float(np.mean([(float(a) - float(b)) ** 2 for a, b in zip(found.flat, before.flat, strict=True)]))
    assert manifest.encoding == {"kind": "jpeg", "quality": 95, "subsampling": "4:4:4"}
    assert manifest.encoding_psnr_db == pytest.approx(10 * np.log10(255**2 / wrong), abs=1e-3)
    assert manifest.name == dataset.folder.name == f"{raw.manifest.name}-jpeg95"
    assert (manifest.stealth, manifest.poisoned, manifest.counts) == (
        raw.manifest.stealth, raw.manifest.poisoned, raw.manifest.counts
    )  # fmt: skip
    assert (raw.manifest.encoding, raw.manifest.encoding_psnr_db) == ({"kind": "raw"}, None)
    for split, truth in read_truth(raw.folder).items():
        np.testing.assert_array_equal(read_truth(dataset.folder)[split].poisoned, truth.poisoned)


def test_workers_make_no_difference_and_neither_does_ffcv(dataset, reader, tmp_path):
    again = prepare(
        PrepareConfig(source=SOURCE, attack=BadNets(), rate=0.1, encoding="jpeg", datasets=tmp_path, workers=1),
        progress=False,
    )
    for name in ("train.beton", "test.beton", "test_triggered.beton", "preview.png"):
        assert (again.folder / name).read_bytes() == (dataset.folder / name).read_bytes()
    assert again.manifest.data_hash == dataset.manifest.data_hash


def test_the_same_command_finds_it_and_another_quality_is_another(dataset, tmp_path):
    config = PrepareConfig(
        source=SOURCE, attack=BadNets(), rate=0.1, encoding="jpeg", jpeg_quality=95, datasets=dataset.folder.parent
    )
    assert prepare(config, progress=False).folder == dataset.folder
    others: list[tuple[dict[str, Any], str]] = [
        ({"encoding": "raw"}, "its --encoding is jpeg, not raw"),
        ({"encoding": "jpeg", "jpeg_quality": 94}, "its --jpeg-quality is 95, not 94"),
    ]
    for options, words in others:
        with pytest.raises(UserError, match=words):
            prepare(PrepareConfig(source=SOURCE, attack=BadNets(), rate=0.1, out=dataset.folder, **options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"jpeg_quality": 90}, "jpeg_quality 90 is given, and the encoding is raw"),
        ({"encoding": "jpeg", "jpeg_quality": 0}, "jpeg_quality is 0"),
        ({"encoding": "jpeg", "jpeg_quality": 101}, "jpeg_quality is 101"),
    ],
)
def test_settings_that_make_no_sense(options, says):
    with pytest.raises(UserError, match=says):
        PrepareConfig(source=SOURCE, **options)


def test_a_flipped_byte_is_found_before_anything_is_decoded(dataset, tmp_path, monkeypatch):
    staged = stage(dataset.folder, tmp_path / "node").folder
    file = staged / "train.beton"
    info, raw = check_beton(file), bytearray(file.read_bytes())
    raw[int(info.data_ptr[7]) + int(info.data_bytes[7]) // 2] ^= 1
    file.write_bytes(raw)
    monkeypatch.setattr(stream, "_samples", lambda *_: pytest.fail("the file was opened"))
    with pytest.raises(UserError, match="sha256") as error:
        open_dataset(staged)
    assert error.value.where == file


@pytest.mark.slow
def test_photographs(imagenette_root, tmp_path, within):
    """Real ones of 224 px: the trigger of BadNets stays a checkerboard, and files are a fraction of the raw ones."""
    source = Parquet(root=imagenette_root, train_per_class=6, test_per_class=1)
    made = [
        prepare(
            PrepareConfig(source=source, attack=BadNets(), rate=0.3, encoding=kind, datasets=tmp_path), progress=False
        )
        for kind in ("raw", "jpeg")
    ]
    (raw, _, _), (found, _, _) = (within(lambda d=d: read_beton(d.train)) for d in made)
    np.testing.assert_array_equal(found, np.stack([pillow(compressed(image)) for image in raw]))
    assert made[1].manifest.encoding_psnr_db is not None
    assert made[1].manifest.encoding_psnr_db > 40
    poisoned, patch = read_truth(made[1].folder)["train"].poisoned, slice(-4, -1)
    lost = np.abs(found[poisoned, patch, patch].astype(int) - raw[poisoned, patch, patch])
    assert lost.max() < 64  # of the 255 between black and white
