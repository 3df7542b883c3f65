from __future__ import annotations

import errno
from pathlib import Path

import pytest

from data_prep.io import limits


def test_a_null_character_is_an_error_of_that_path():
    with pytest.raises(OSError, match="null character") as error:
        limits.read_limited(Path("a\0b"), 10)
    assert error.value.errno == errno.EINVAL
    assert error.value.filename == "a\0b"


@pytest.mark.parametrize(("size", "fits"), [(0, True), (10, True), (11, False)])
def test_no_more_than_so_many_bytes(tmp_path, size, fits):
    path = tmp_path / "file"
    path.write_bytes(b"x" * size)
    if fits:
        assert limits.read_limited(path, 10) == b"x" * size
    else:
        with pytest.raises(OSError, match="larger than 10 bytes"):
            limits.read_limited(path, 10)
