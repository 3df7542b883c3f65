from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.dataset.samples import SplitSamples, read_origins, read_samples, write_samples
from data_prep.dataset.truth import SplitTruth, read_truth, write_truth
from data_prep.errors import UserError


@pytest.fixture
def folder(tmp_path, rng):
    """Truth and samples of three splits."""
    truth = {
        name: SplitTruth(rng.integers(0, 5, count), rng.random(count) < 0.3, rng.random(count) < 0.2)
        for name, count in (("train", 40), ("test", 1), ("test_triggered", 17))
    }
    write_truth(tmp_path, truth)
    write_samples(tmp_path, {"train": SplitSamples(np.arange(3), ["a/ü.png", "b.png#1", ""])})
    return tmp_path, truth


def test_what_is_written_is_read(folder):
    path, truth = folder
    read = read_truth(path)
    assert list(read) == list(truth)
    for name, known in truth.items():
        assert read[name].true_label.dtype == np.int64
        assert read[name].poisoned.dtype == bool
        assert read[name].true_label.tolist() == known.true_label.tolist()
        assert read[name].poisoned.tolist() == known.poisoned.tolist()
    assert read_samples(path)["train"].label.tolist() == [0, 1, 2]
    assert read_origins(path) == ["a/ü.png", "b.png#1", ""]


def test_rows_may_stand_in_any_order(folder, rng):
    path, truth = folder
    table = pq.read_table(path / "truth.parquet")
    pq.write_table(table.take(rng.permutation(len(table))), path / "truth.parquet")
    read = read_truth(path)
    for name, known in truth.items():
        assert read[name].true_label.tolist() == known.true_label.tolist()
        assert read[name].poisoned.tolist() == known.poisoned.tolist()


def table_faults():
    def column(name, values, kind):
        return lambda t: t.set_column(t.column_names.index(name), name, pa.array(values, kind))

    return {
        "no truth": (lambda t: t.drop_columns(["poisoned"]), "no column 'poisoned' of type bool"),
        "flags as numbers": (column("poisoned", [1] * 58, pa.int64()), "no column 'poisoned' of type bool"),
        "short labels": (column("true_label", [1] * 58, pa.int32()), "no column 'true_label' of type int64"),
        "null": (column("true_label", [None] + [1] * 57, pa.int64()), "'true_label' holds nulls"),
        "no index": (lambda t: t.drop_columns(["index"]), "no column 'index'"),
        "index twice": (column("index", [0, *range(57)], pa.int64()), "indices of train are not 0 to 39"),
        "row missing": (lambda t: t.slice(1), "indices of train are not 0 to 38"),
        "negative": (column("index", [-1, *range(57)], pa.int64()), "indices of train"),
    }


@pytest.mark.parametrize("name", table_faults())
def test_tables_that_are_not_the_truth(name, folder):
    path, _ = folder
    edit, says = table_faults()[name]
    pq.write_table(edit(pq.read_table(path / "truth.parquet")), path / "truth.parquet")
    with pytest.raises(UserError, match=says) as error:
        read_truth(path)
    assert error.value.where == path / "truth.parquet"


@pytest.mark.parametrize("harm", [lambda b: b"", lambda b: b[:-1], lambda b: b[50:], lambda b: b"text" * 100])
def test_files_that_are_no_tables(harm, folder):
    path, _ = folder
    for name, read in (("truth.parquet", read_truth), ("samples.parquet", read_samples)):
        (path / name).write_bytes(harm((path / name).read_bytes()))
        with pytest.raises(UserError, match="unreadable table") as error:
            read(path)
        assert error.value.where == path / name


@pytest.mark.slow
def test_no_damage_gets_anything_but_a_table_or_a_user_error(folder, rng):
    """Flipped bytes can make invalid strings, which pyarrow reads and then fails on."""
    path, _ = folder
    for name, read in (("truth.parquet", read_truth), ("samples.parquet", read_samples)):
        whole = (path / name).read_bytes()
        failed = 0
        for _ in range(400):
            damaged = bytearray(whole)
            for position in rng.integers(0, len(whole), rng.integers(1, 5)):
                damaged[position] = rng.integers(0, 256)
            (path / name).write_bytes(damaged)
            try:
                read(path)
            except UserError:
                failed += 1
        assert failed > 100


def test_absent(tmp_path):
    with pytest.raises(UserError, match="holds no truth"):
        read_truth(tmp_path)
    with pytest.raises(UserError, match=r"samples\.parquet: unreadable table"):
        read_samples(tmp_path)
