"""Files of this project without FFCV, against FFCV's own."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.beton import BetonStream, BetonWriter, check_beton, read_beton, stream, write_beton
from data_prep.errors import UserError


def samples(count: int, px: int) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(count)
    return draws.integers(0, 256, (count, px, px, 3), dtype=np.uint8), draws.integers(-5, 1 << 40, count)


@pytest.fixture
def without_ffcv(monkeypatch):
    def leave_out() -> None:
        monkeypatch.setattr(stream, "ffcv_installed", lambda: False)

    return leave_out


# 683 images of 32 px fill one page of 2 MiB and begin the next; 31 of 224 px make pages of 8 MiB
@pytest.mark.parametrize(("count", "px"), [(1, 8), (50, 16), (683, 32), (60, 224)])
def test_the_same_bytes_as_ffcv_writes(tmp_path, ffcv_writes, count, px):
    images, labels = samples(count, px)
    ffcv_writes(tmp_path / "ffcv.beton", images, labels)
    write_beton(tmp_path / "ours.beton", images, labels)
    assert (tmp_path / "ffcv.beton").read_bytes() == (tmp_path / "ours.beton").read_bytes()


def test_reads_what_ffcv_reads(tmp_path, without_ffcv):
    images, labels = samples(700, 32)
    write_beton(tmp_path / "a.beton", images, labels)
    order = np.random.default_rng(0).integers(0, 700, 300)
    with BetonStream(tmp_path / "a.beton") as stream:
        theirs = [tuple(part.copy() for part in batch) for batch in stream.batches(order, 128)]
    without_ffcv()
    with BetonStream(tmp_path / "a.beton") as stream:
        ours = list(stream.batches(order, 128))
        dropped = list(stream.batches(order, 128, drop_last=True))
    assert [len(batch[0]) for batch in ours] == [128, 128, 44]
    assert len(dropped) == 2
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            np.testing.assert_array_equal(a, b)
    for found, expected in zip(read_beton(tmp_path / "a.beton"), (images, labels, np.arange(700)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_closed_stream_and_a_failed_writer(tmp_path, without_ffcv):
    without_ffcv()
    images, labels = samples(4, 8)
    write_beton(tmp_path / "a.beton", images, labels)
    stream = BetonStream(tmp_path / "a.beton")
    stream.close()
    with pytest.raises(ValueError, match="closed"):
        stream.batches(np.arange(4), 2)
    with (
        pytest.raises(ValueError, match="of 4 samples"),
        BetonWriter(tmp_path / "b.beton", count=4, height_px=8, width_px=8) as writer,
    ):
        writer.write(images[:2], labels[:2])
    assert [p.name for p in tmp_path.iterdir()] == ["a.beton"]  # nothing half-written stays
    with pytest.raises(UserError, match="cannot write"):
        write_beton(tmp_path / "none" / "c.beton", images, labels)
    assert check_beton(tmp_path / "a.beton").count == 4
