from __future__ import annotations

import gc
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from data_prep.beton import BetonStream, BetonWriter, check_beton, read_beton, write_beton
from data_prep.beton.ffcv import Epoch
from data_prep.errors import UserError

# Where things lie in a file of three fields: header, field descriptors, sample table; pixels; table of regions.
FIELD, FIELD_BYTES, SAMPLES, SAMPLE_BYTES, REGION_BYTES = 24, 1 + 16 + 1024, 24 + 3 * (1 + 16 + 1024), 32, 24
COUNT, PX = 5, 8


def random_samples(count: int, px: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, px, px, 3), dtype=np.uint8), rng.integers(0, 10, count)


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray]:
    return random_samples(103, PX)


@pytest.fixture(scope="module")
def stream(samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "train.beton"
    write_beton(path, *samples)
    with BetonStream(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file of five images."""
    path = tmp_path_factory.mktemp("whole") / "x.beton"
    write_beton(path, *random_samples(COUNT, PX))
    return path.read_bytes()


def parse(raw: bytes) -> list[tuple[np.ndarray, int, int]]:
    """The obvious reader: a loop over the tables."""
    version, fields, _, count, table = struct.unpack_from("<HHIQQ", raw)
    assert (version, fields) == (2, 3)
    parsed = []
    for i in range(count):
        mode, width, height, ptr = struct.unpack_from("<BHHQ", raw, SAMPLES + i * SAMPLE_BYTES)
        label, index = struct.unpack_from("<qq", raw, SAMPLES + i * SAMPLE_BYTES + 16)
        assert mode == 1
        assert struct.unpack_from("<QQQ", raw, table + i * REGION_BYTES) == (i, ptr, width * height * 3)
        parsed.append((np.frombuffer(raw, np.uint8, width * height * 3, ptr).reshape(height, width, 3), label, index))
    return parsed


# -------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize(
    ("count", "px"),
    [(1, 1), (1, 8), (2, 33), (103, 16), (50, 128)],  # the last takes two pages
)
def test_what_is_written_is_read(count, px, tmp_path, within):
    images, labels = random_samples(count, px)
    path = tmp_path / "x.beton"
    write_beton(path, images, labels)
    got, got_labels, got_index = within(lambda: read_beton(path, expect_count=count, expect_px=px))
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert (got == images).all()
    assert (got_labels.dtype, got_index.dtype) == (np.int64, np.int64)
    assert (got_labels == labels).all()
    assert (got_index == np.arange(count)).all()
    for i, (image, label, index) in enumerate(parse(path.read_bytes())):
        assert (image == images[i]).all()
        assert (label, index) == (labels[i], i)


def test_images_need_not_be_square_nor_labels_small(tmp_path, within):
    images = np.arange(2 * 3 * 7 * 3, dtype=np.uint8).reshape(2, 3, 7, 3)
    labels = np.array([-(2**63), 2**63 - 1])
    write_beton(tmp_path / "x.beton", iter(images), labels)
    got, got_labels, _ = within(lambda: read_beton(tmp_path / "x.beton"))
    assert (got == images).all()
    assert (got_labels == labels).all()


def test_equal_samples_give_equal_bytes(samples, tmp_path):
    images, labels = samples
    write_beton(tmp_path / "one", images, labels)
    with BetonWriter(tmp_path / "two", count=103, height_px=PX, width_px=PX) as writer:
        for start in range(0, 103, 10):
            writer.write(images[start : start + 10], labels[start : start + 10])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# -------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("batch_size", [1, 7, 50, 103, 500])
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_order_is_indexing(batch_size, drop_last, stream, samples, rng, within):
    images, labels = samples
    order = rng.integers(0, 103, 200)  # with repeats
    if drop_last and batch_size > 200:
        with pytest.raises(ValueError, match="no batch"):
            stream.batches(order, batch_size, drop_last)
        return
    batches = within(lambda: [(i.copy(), y, x) for i, y, x in stream.batches(order, batch_size, drop_last)])
    expected = [order[start : start + batch_size] for start in range(0, 200, batch_size)]
    if drop_last and len(expected[-1]) < batch_size:
        expected.pop()
    assert len(batches) == len(expected)
    for (got, got_labels, index), wanted in zip(batches, expected):
        assert (index == wanted).all()
        assert (got == images[wanted]).all()
        assert (got_labels == labels[wanted]).all()


def test_a_set_smaller_than_the_batch(stream, samples, within):
    ((images, labels, index),) = within(lambda: list(stream.batches(np.array([102, 0], dtype=np.uint8), 64)))
    assert index.tolist() == [102, 0]
    assert (images == samples[0][[102, 0]]).all()
    assert (labels == samples[1][[102, 0]]).all()


def test_two_passes_and_two_files_at_once(stream, samples, tmp_path, within):
    other_images, other_labels = random_samples(30, 20, seed=1)
    write_beton(tmp_path / "other.beton", other_images, other_labels)

    def read() -> None:
        with BetonStream(tmp_path / "other.beton", batches_ahead=1) as other:
            forward, backward = np.arange(100), np.arange(100)[::-1]
            passes = zip(
                stream.batches(forward, 10), stream.batches(backward, 5), other.batches(np.arange(30), 3), strict=False
            )
            rounds = 0
            for (a, _, i), (b, _, j), (c, _, k) in passes:
                assert (a == samples[0][i]).all()
                assert (b == samples[0][j]).all()
                assert (c == other_images[k]).all()
                rounds += 1
            assert rounds == 10

    within(read)


def test_index_out_of_range(stream):
    for order in ([0, 103], [-1, 5]):
        with pytest.raises(IndexError, match="the file holds 0 to 102"):
            stream.batches(np.array(order), 2)


@pytest.mark.parametrize(
    ("order", "batch_size"), [([], 4), ([0, 1], 0), ([0.0, 1.0], 2), ([[0, 1]], 2), ([True, False], 2)]
)
def test_orders_that_make_no_sense(order, batch_size, stream):
    with pytest.raises(ValueError):
        stream.batches(np.array(order), batch_size)


def test_torch_and_numpy_are_left_as_they_were(samples, tmp_path, within):
    import torch

    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is what must not move
    threads = torch.get_num_threads()
    write_beton(tmp_path / "x.beton", *samples)
    torch.set_num_threads(3)
    try:
        within(lambda: read_beton(tmp_path / "x.beton"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


# -------------------------------------------------------------------------------- stopping, and trouble while reading


def test_stopping_early_leaves_nothing_behind_and_the_stream_usable(samples, tmp_path, within):
    path = tmp_path / "x.beton"
    write_beton(path, *samples)

    def maps() -> int:
        return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    with BetonStream(path) as opened:
        before = threading.active_count()
        for i in range(12):

            def stop_after_one(i: int = i) -> None:
                for images, _, index in opened.batches(np.arange(103), 4):
                    assert (images == samples[0][index]).all()
                    if i % 2:
                        break

            within(stop_after_one)
            assert not any(isinstance(thread, Epoch) for thread in threading.enumerate())
            opened.batches(np.arange(103), 4)  # never begun
        half_read = opened.batches(np.arange(103), 4)
        next(half_read)
        assert (within(lambda: next(opened.batches(np.arange(103), 103)))[0] == samples[0]).all()
    gc.collect()
    assert threading.active_count() <= before
    with pytest.raises(ValueError, match="closed"):
        opened.batches(np.arange(3), 1)
    opened = half_read = None
    gc.collect()
    assert maps() == 0


@pytest.mark.slow
def test_an_abandoned_pass_does_not_abort_the_process(samples, tmp_path, run_python):
    """Bare FFCV ended half of such processes with SIGABRT."""
    write_beton(tmp_path / "x.beton", *samples)
    done = run_python(
        "import numpy as np\n"
        "from data_prep.beton import BetonStream\n"
        f"stream = BetonStream({str(tmp_path / 'x.beton')!r})\n"
        "reading = [stream.batches(np.arange(103), 2) for _ in range(4)]\n"
        "print(sum(int(next(r)[1].sum()) for r in reading))\n"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 4 * samples[1][:2].sum()


def test_an_error_on_the_readers_thread_reaches_the_consumer(stream, samples, monkeypatch, within):
    run_pipeline = Epoch.run_pipeline

    def fail(self, b_ix, *rest):
        if b_ix == 3:
            raise MemoryError("no buffer left")
        return run_pipeline(self, b_ix, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Epoch, "run_pipeline", fail)
        seen = []

        def read() -> None:
            for _, _, index in stream.batches(np.arange(103), 10):
                seen.extend(index)

        with pytest.raises(RuntimeError, match=r"train\.beton") as error:
            within(read)
    assert "no buffer left" in str(error.value.__cause__)
    assert seen == list(range(30))
    assert (within(lambda: next(stream.batches(np.arange(103), 103)))[0] == samples[0]).all()


@pytest.mark.parametrize("harm", [lambda p: os.truncate(p, 4096), Path.unlink, lambda p: p.write_bytes(b"other")])
def test_a_file_that_changes_while_it_is_open(harm, whole, tmp_path, within):
    path = tmp_path / "x.beton"
    path.write_bytes(whole)
    with BetonStream(path) as opened:
        within(lambda: list(opened.batches(np.arange(COUNT), 2)))
        harm(path)
        with pytest.raises(UserError, match="while in use") as error:
            opened.batches(np.arange(COUNT), 2)
        assert error.value.where == path


# -------------------------------------------------------------------------------- damaged files


def put(offset: int, layout: str, *values: int):
    def edit(raw: bytearray) -> bytearray:
        struct.pack_into(layout, raw, offset, *values)
        return raw

    return edit


def each_sample(offset: int, layout: str, value: int):
    def edit(raw: bytearray) -> bytearray:
        for i in range(COUNT):
            struct.pack_into(layout, raw, SAMPLES + i * SAMPLE_BYTES + offset, value)
        return raw

    return edit


def overlapping(raw: bytearray) -> bytearray:
    """Sample 1 shows the pixels of sample 0, in both tables."""
    (table,) = struct.unpack_from("<Q", raw, 16)
    (ptr,) = struct.unpack_from("<Q", raw, SAMPLES + 5)
    struct.pack_into("<Q", raw, SAMPLES + SAMPLE_BYTES + 5, ptr)
    struct.pack_into("<Q", raw, table + REGION_BYTES + 8, ptr)
    return raw


def outside(raw: bytearray) -> bytearray:
    """The last sample's pixels lie at the end of the address space, in both tables."""
    (table,) = struct.unpack_from("<Q", raw, 16)
    struct.pack_into("<Q", raw, SAMPLES + 4 * SAMPLE_BYTES + 5, 2**64 - 100)
    struct.pack_into("<Q", raw, table + 4 * REGION_BYTES + 8, 2**64 - 100)
    return raw


FAULTS = {
    "empty": (lambda raw: b"", "truncated"),
    "cut in the header": (lambda raw: raw[:20], "truncated"),
    "cut in the field descriptors": (lambda raw: raw[:2000], "truncated"),
    "cut in the sample table": (lambda raw: raw[: SAMPLES + 40], "truncated"),
    "cut in the pixels": (lambda raw: raw[: 3 << 20], "truncated"),
    "last byte missing": (lambda raw: raw[:-1], "truncated"),
    "last record missing": (lambda raw: raw[:-REGION_BYTES], "truncated"),
    "bytes appended": (lambda raw: raw + b"\0" * REGION_BYTES, "damaged"),
    "a text": (lambda raw: b"this is no data file, but it is long enough to be one", "not a .beton file"),
    "a PNG": (lambda raw: b"\x89PNG\r\n\x1a\n" + bytes(5000), "not a .beton file"),
    "zeros": (lambda raw: bytes(len(raw)), "not a .beton file"),
    "another version": (put(0, "<H", 3), "version 3"),
    "two fields": (put(2, "<H", 2), "2 fields"),
    "odd page size": (put(4, "<I", 12345), "page size 12345"),
    "no samples": (put(8, "<Q", 0), "0 samples"),
    "more samples than there are": (put(8, "<Q", 6), "6 samples"),
    "samples for all memory": (put(8, "<Q", 2**63), "do not fit"),
    "killed writer": (put(16, "<Q", 0), "never finished"),
    "tables overlap": (put(16, "<Q", 100), "damaged"),
    "misspelt field": (put(FIELD + FIELD_BYTES + 1, "<B", ord("L")), "'label' belongs"),
    "field of another type": (put(FIELD, "<B", 5), "type 5"),
    "one JPEG": (put(SAMPLES + 2 * SAMPLE_BYTES, "<B", 0), "not all stored as raw"),
    "one width": (put(SAMPLES + 3 * SAMPLE_BYTES + 1, "<H", 9), "not all of one size"),
    "no width": (each_sample(1, "<H", 0), "not all of one size"),
    "wider than what is stored": (each_sample(1, "<H", 4000), "outside"),
    "index twice": (put(SAMPLES + 4 * SAMPLE_BYTES + 24, "<q", 3), "indices"),
    "pixels of another": (overlapping, "over another's"),
    "pixels beyond the file": (outside, "outside"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_files_are_refused(name, whole, tmp_path, within):
    edit, says = FAULTS[name]
    path = tmp_path / "x.beton"
    path.write_bytes(edit(bytearray(whole)))
    for read in (check_beton, read_beton, BetonStream):
        with pytest.raises(UserError, match=says) as error:
            within(lambda read=read: read(path))
        assert error.value.where == path


def test_every_byte_of_the_tables_counts(tmp_path):
    """All but labels, padding and FFCV's field arguments, which only the sha256 of the manifest can vouch for."""
    path = tmp_path / "x.beton"
    write_beton(path, *random_samples(2, PX))
    table = struct.unpack_from("<Q", path.read_bytes(), 16)[0]
    positions = list(range(24))
    positions += [FIELD + f * FIELD_BYTES + i for f in range(3) for i in range(17)]
    positions += [SAMPLES + s * SAMPLE_BYTES + i for s in range(2) for i in range(32) if not 13 <= i < 24]
    positions += range(table, table + 2 * REGION_BYTES)
    accepted = []
    with path.open("r+b") as file:
        for position in positions:
            file.seek(position)
            (byte,) = file.read(1)
            file.seek(position)
            file.write(bytes([byte ^ 0xFF]))
            file.flush()
            try:
                check_beton(path)
                accepted.append(position)
            except UserError:
                pass
            file.seek(position)
            file.write(bytes([byte]))
            file.flush()
    assert accepted == []
    assert check_beton(path).count == 2


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "gone.beton", tmp_path):
        with pytest.raises(UserError, match="cannot read the data file") as error:
            read_beton(path)
        assert error.value.where == path


def test_not_what_the_manifest_promises(whole, tmp_path):
    path = tmp_path / "x.beton"
    path.write_bytes(whole)
    for expected, says in (({"expect_count": 6}, "holds 5 images, .* says 6"), ({"expect_px": 16}, "8 x 8 px.*16 x")):
        for read in (read_beton, BetonStream):
            with pytest.raises(UserError, match=says) as error:
                read(path, **expected)
            assert error.value.where == path


# -------------------------------------------------------------------------------- trouble while writing


def test_a_stopped_write_leaves_what_was_there(samples, tmp_path, files_below):
    images, labels = samples
    path = tmp_path / "x.beton"
    path.write_text("before")

    def stop(trouble: type[BaseException]) -> None:
        with BetonWriter(path, count=103, height_px=PX, width_px=PX) as writer:
            writer.write(images[:50], labels[:50])
            raise trouble

    for trouble in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(trouble):
            stop(trouble)
    with (
        pytest.raises(ValueError, match="50 of 103"),
        BetonWriter(path, count=103, height_px=PX, width_px=PX) as w,
    ):
        w.write(images[:50], labels[:50])
    assert files_below(tmp_path) == ["x.beton"]
    assert path.read_text() == "before"


def test_samples_that_do_not_fit_the_announcement(tmp_path, files_below):
    images, labels = random_samples(4, PX)
    wrong = [
        (images[:3], labels[:2]),
        (images, labels),
        (images[:, :4], labels),
        (images.astype(np.int16), labels),
        (images[:, :, :, 0], labels),
    ]
    for bad_images, bad_labels in wrong:
        with (
            pytest.raises(ValueError),
            BetonWriter(tmp_path / "x", count=3, height_px=PX, width_px=PX) as writer,
        ):
            writer.write(bad_images, bad_labels)
    for none, no_labels in ((images[:0], labels[:0]), (images[..., 0], labels), (images, labels[:2])):
        with pytest.raises(ValueError):
            write_beton(tmp_path / "x", none, no_labels)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("room", [0, 10, 3000, 1 << 20, (2 << 20) + 50, (4 << 20) - 1, (4 << 20) + 20])
def test_a_full_disk(room, tmp_path, file_size_limit, files_below):
    file_size_limit(room)
    with pytest.raises(UserError, match="cannot write the data file") as error:
        write_beton(tmp_path / "x.beton", *random_samples(COUNT, PX))
    file_size_limit(None)
    assert error.value.where == tmp_path / "x.beton"
    assert files_below(tmp_path) == []


def test_a_disk_that_was_full_for_a_moment(tmp_path, file_size_limit, files_below):
    """The system takes a part of what is written and says so, which FFCV's own writer does not hear."""
    images, labels = random_samples(43, 128)  # 42 of them fill a page

    def write() -> None:
        with BetonWriter(tmp_path / "x.beton", count=43, height_px=128, width_px=128) as writer:
            writer.write(images[:42], labels[:42])
            file_size_limit(3 << 20)
            writer.write(images[42:], labels[42:])
            file_size_limit(None)

    with pytest.raises(UserError, match="cannot write the data file"):
        write()
    assert files_below(tmp_path) == []


def test_a_failing_write_in_the_middle(tmp_path, monkeypatch, files_below):
    put = BetonWriter._put

    def fail(self, data, label):
        if self._written == 2:
            raise OSError(5, "Input/output error")
        put(self, data, label)

    monkeypatch.setattr(BetonWriter, "_put", fail)
    with pytest.raises(UserError, match="Input/output error") as error:
        write_beton(tmp_path / "x.beton", *random_samples(COUNT, PX))
    assert error.value.where == tmp_path / "x.beton"
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere/x.beton", "a" * 250])
def test_a_place_that_cannot_be_written(name, tmp_path, files_below):
    with pytest.raises(UserError, match="cannot write the data file") as error:
        write_beton(tmp_path / name, *random_samples(2, PX))
    assert error.value.where == tmp_path / name
    assert files_below(tmp_path) == []


def test_images_too_large_for_the_format(tmp_path):
    for height, width in ((1, 1 << 16), (20_000, 20_000)):
        with pytest.raises(UserError, match=f"{width} x {height} px do not fit"):
            BetonWriter(tmp_path / "x.beton", count=1, height_px=height, width_px=width)


def test_a_killed_writer(tmp_path, run_python, files_below):
    """Nothing under the file's name, no shared memory, and what it leaves is refused."""
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    killed = run_python(
        "import os, signal, numpy as np\n"
        "from data_prep.beton import BetonWriter\n"
        f"writer = BetonWriter({str(tmp_path / 'x.beton')!r}, count=50, height_px=128, width_px=128)\n"
        "writer.write(np.zeros((45, 128, 128, 3), np.uint8), np.zeros(45, int))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "x.beton").exists()
    for name in files_below(tmp_path):
        with pytest.raises(UserError, match="never finished"):
            check_beton(tmp_path / name)
    if shared.is_dir():
        assert not [p.name for p in set(shared.iterdir()) - before if p.name.startswith("psm_")]
