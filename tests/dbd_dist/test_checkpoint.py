"""States on disk: whole or not there, never damaged without being told, and written although storage comes and goes."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from dbd_dist.runtime import checkpoint
from dbd_dist.runtime.checkpoint import (
    Checkpoints,
    DamagedState,
    StageStore,
    load_state,
    on_cpu,
    retry_on_oserror,
    save_state,
)
from dbd_dist.runtime.mirror import Mirror

ROW = {"stage": "simclr", "epoch": 3, "epochs": 4, "loss": 1.5, "time_s": 0.1}
STATE = {"stage": "simclr", "key": "k", "rows": [ROW], "state": {"w": torch.arange(5.0), "epoch": 3}}


def numbered(value: float) -> dict:
    return STATE | {"state": {"w": torch.full((3,), value), "epoch": int(value)}}


def test_a_state_comes_back(tmp_path):
    save_state(STATE, tmp_path / "new" / "state.pt")
    found = load_state(tmp_path / "new" / "state.pt", needs=("stage", "state"))
    assert torch.equal(found["state"].pop("w"), STATE["state"]["w"])
    assert found == STATE | {"state": {"epoch": 3}}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["state.pt"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("stored") / "state.pt"
    save_state(STATE, path)
    return path.read_bytes()


@settings(max_examples=150, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(stored, where, bit, tmp_path_factory):
    content = bytearray(stored)
    content[int(where * len(content))] ^= 1 << bit
    path = tmp_path_factory.mktemp("flipped") / "state.pt"
    path.write_bytes(content)
    with pytest.raises(DamagedState, match="damaged"):
        load_state(path, needs=("state",))


@pytest.mark.parametrize("length", [0, 5, 12, 40, 80, 500])
def test_a_cut_off_state_is_found(stored, length, tmp_path):
    path = tmp_path / "state.pt"
    path.write_bytes(stored[:length])
    with pytest.raises(DamagedState, match="damaged"):
        load_state(path, needs=("state",))


class Attack:
    """Whatever unpickles it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def test_a_state_from_a_stranger_runs_no_code(tmp_path):
    """Its hash is right: that tells damage, not malice."""
    marker = tmp_path / "executed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", lambda state, file: file.write(pickle.dumps(state)))
        save_state({"state": Attack(marker)}, tmp_path / "raw.pt")
    torch_save = tmp_path / "zip.pt"
    save_state({"state": Attack(marker)}, torch_save)
    for path in (tmp_path / "raw.pt", torch_save):
        with pytest.raises(UserError, match="not readable as a state"):
            load_state(path, needs=("state",))
    assert not marker.exists()


def test_the_newest_are_kept(tmp_path):
    kept = Checkpoints(tmp_path / "c", is_main=True, keep=2)
    assert kept.newest() is None
    for value in range(5):
        kept.save(numbered(value))
    kept.flush()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["checkpoint_000003.pt", "checkpoint_000004.pt"]
    name, state = Checkpoints(tmp_path / "c", is_main=False).newest() or ("", {})
    assert (name, state["state"]["epoch"]) == ("checkpoint_000004.pt", 4)
    kept.close()


def test_a_state_is_the_one_of_the_moment_it_was_saved(tmp_path):
    """What is written in the background does not see what training does meanwhile."""
    weights = torch.zeros(1000, 1000)
    kept = Checkpoints(tmp_path, is_main=True)
    kept.save(STATE | {"state": {"w": weights, "epoch": 0, "list": [weights]}})
    weights += 1
    kept.flush()
    found = kept.newest()
    assert found is not None
    assert found[1]["state"]["w"].sum() == 0
    assert found[1]["state"]["list"][0].sum() == 0
    assert on_cpu((weights,))[0] is not weights
    kept.close()


def test_a_damaged_state_is_told_of_and_passed_over(tmp_path, caplog):
    kept = Checkpoints(tmp_path, is_main=True)
    for value in (1, 2):
        kept.save(numbered(value))
    kept.flush()
    path = tmp_path / "checkpoint_000001.pt"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = kept.newest()
    assert found is not None
    assert found[0] == "checkpoint_000000.pt"
    assert "checkpoint_000001.pt: damaged" in caplog.text
    kept.save(numbered(3))  # and its number is not given again
    kept.flush()
    assert (kept.newest() or ("",))[0] == "checkpoint_000002.pt"
    kept.close()


@pytest.mark.parametrize(
    "change",
    [
        {"stage": ["simclr"]}, {"stage": None}, {"key": 1}, {"rows": "rows"}, {"rows": {}}, {"rows": [1]},
        {"rows": [{**ROW, "epoch": "1"}]}, {"rows": [{"stage": "simclr"}]}, {"rows": [{**ROW, "loss": "low"}]},
        {"state": []}, {"state": {}}, {"state": {"epoch": None}}, {"state": {"epoch": -1}}, {"state": {"epoch": True}},
        {"state": {"epoch": 1, "step": "2"}},
    ],
)  # fmt: skip
def test_a_sealed_state_of_other_content_is_passed_over(change, tmp_path, caplog):
    save_state(STATE, tmp_path / "checkpoint_000000.pt")
    save_state(STATE | change, tmp_path / "checkpoint_000001.pt")
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path, is_main=True).newest()
    assert found is not None
    assert found[0] == "checkpoint_000000.pt"
    assert "checkpoint_000001.pt: not a state of a run" in caplog.text


def test_what_a_detector_reports_has_no_loss(tmp_path):
    row = {name: value for name, value in ROW.items() if name != "loss"}
    save_state(STATE | {"rows": [ROW, row]}, tmp_path / "checkpoint_000000.pt")
    found = Checkpoints(tmp_path, is_main=True).newest()
    assert found is not None
    assert found[1]["rows"] == [ROW, row]


def put_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("x")


@pytest.mark.parametrize(
    "put",
    [
        put_folder,
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: os.mkfifo(path),
        lambda path: path.write_bytes(b""),
    ],
    ids=["folder", "dangling", "circle", "device", "pipe", "empty"],
)
def test_what_is_no_file_is_passed_over_and_the_run_writes_on(put, tmp_path, caplog):
    save_state(STATE, tmp_path / "checkpoint_000004.pt")
    put(tmp_path / "checkpoint_000005.pt")
    kept = Checkpoints(tmp_path, is_main=True)
    assert (kept.newest() or ("",))[0] == "checkpoint_000004.pt"
    assert "checkpoint_000005.pt" in caplog.text
    kept.save(numbered(1))
    kept.flush()
    kept.close()
    assert (kept.newest() or ("",))[0] == "checkpoint_000006.pt"


@pytest.mark.parametrize("name", ["checkpoint_final.pt", "checkpoint_.pt", "checkpoint_1.pt", "checkpoint_٠٠٠٠٠٩.pt"])
def test_other_names_are_not_ours(name, tmp_path):
    save_state(STATE, tmp_path / "checkpoint_000004.pt")
    (tmp_path / name).write_text("mine")
    kept = Checkpoints(tmp_path, is_main=True)
    assert (kept.newest() or ("",))[0] == "checkpoint_000004.pt"
    for value in (1, 2, 3):
        kept.save(numbered(value))
    kept.flush()
    kept.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "checkpoint_000006.pt", "checkpoint_000007.pt"])
    assert (tmp_path / name).read_text() == "mine"


def test_storage_that_cannot_be_read_starts_nothing_anew(tmp_path, monkeypatch):
    save_state(STATE, tmp_path / "checkpoint_000004.pt")

    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match="Input/output error"):
        Checkpoints(tmp_path, is_main=True).newest()


def test_other_ranks_write_nothing(tmp_path):
    kept = Checkpoints(tmp_path / "c", is_main=False)
    kept.save(STATE)
    kept.flush()
    assert not (tmp_path / "c").exists()


# -- storage that fails


class Outage:
    """`os.replace` fails for the first `times` calls."""

    def __init__(self, monkeypatch, times: int, number: int = errno.ENOSPC):
        self.left, self.number, self._replace = times, number, os.replace
        monkeypatch.setattr(os, "replace", self)
        monkeypatch.setattr(checkpoint, "FIRST_WAIT_S", 0.01)

    def __call__(self, source, target) -> None:
        if self.left > 0:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), str(target))
        self._replace(source, target)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
def test_storage_that_is_gone_for_a_while_costs_nothing(number, tmp_path, monkeypatch, caplog):
    Outage(monkeypatch, 3, number)
    kept = Checkpoints(tmp_path, is_main=True, patience_s=30)
    kept.save(STATE)
    kept.flush()
    assert caplog.text.count("trying again") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_000000.pt"]
    kept.close()


def test_storage_that_stays_full_ends_in_a_message_and_keeps_what_was_there(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, is_main=True, patience_s=0.05)
    kept.save(numbered(1))
    kept.flush()
    outage = Outage(monkeypatch, 10**6)
    kept.save(numbered(2))
    with pytest.raises(UserError, match=r"checkpoint_000001.pt: cannot be written \(No space left on device\)"):
        kept.flush()
    outage.left = 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_000000.pt"]
    found = kept.newest()
    assert found is not None
    assert found[1]["state"]["epoch"] == 1
    kept.close()


def test_a_full_device_is_an_error_of_the_storage(tmp_path):
    """The real thing: /dev/full takes nothing."""
    with pytest.raises(UserError, match="No space left"):
        retry_on_oserror(lambda: Path("/dev/full").write_bytes(b"x"), tmp_path, 0.0)


def test_the_writer_is_waited_for(tmp_path, monkeypatch):
    """No state is dropped because the one before is still being written."""
    going, order = threading.Event(), []
    real = checkpoint.save_state

    def slow(state, path, **_) -> None:
        going.wait(5)
        real(state, path)
        order.append(state["state"]["epoch"])

    monkeypatch.setattr(checkpoint, "save_state", slow)
    kept = Checkpoints(tmp_path, is_main=True)
    kept.save(numbered(1))
    assert order == []  # the caller did not wait
    going.set()
    kept.save(numbered(2))
    kept.flush()
    assert order == [1, 2]
    kept.close()


# -- finished stages, and the mirror


def test_a_finished_stage_is_found_and_leaves_no_files_aside(tmp_path):
    store = StageStore(tmp_path)
    (tmp_path / "simclr-k").mkdir()
    (tmp_path / "simclr-k" / ".state.pt.12345678").write_bytes(b"of a killed process")
    assert not store.has("simclr", "k")
    store.save("simclr", "k", {"rows": [], "backbone": {"w": torch.ones(2)}})
    assert store.has("simclr", "k")
    assert [p.name for p in (tmp_path / "simclr-k").iterdir()] == ["state.pt"]
    assert torch.equal(store.load("simclr", "k")["backbone"]["w"], torch.ones(2))


def test_the_mirror_gives_back_what_is_lost(tmp_path):
    here, there = tmp_path / "runs", tmp_path / "far" / "away"
    mirror = Mirror(there.as_uri(), here)
    kept = Checkpoints(here / "run" / "checkpoints", is_main=True, mirror=mirror)
    for value in range(4):
        kept.save(numbered(value))
    kept.flush()
    store = StageStore(here / "stages", mirror=mirror)
    store.save("simclr", "k", {"rows": []})
    found = sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file())
    assert found == [
        "run/checkpoints/checkpoint_000002.pt", "run/checkpoints/checkpoint_000003.pt", "stages/simclr-k/state.pt",
    ]  # fmt: skip
    for path in here.rglob("*.pt"):
        assert path.read_bytes() == (there / path.relative_to(here)).read_bytes()
        path.unlink()
    assert kept.newest() is None
    assert len(mirror.fetch(here / "run" / "checkpoints", pattern="checkpoint_*.pt")) == 2
    assert (kept.newest() or ("",))[0] == "checkpoint_000003.pt"
    mirror.fetch(store.path("simclr", "k").parent, pattern="state.pt")
    assert store.has("simclr", "k")
    assert mirror.fetch(here / "nowhere", pattern="*") == []
    kept.close()


def test_a_mirror_that_fails_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    mirror = Mirror((tmp_path / "file" / "below").as_uri(), tmp_path / "runs")
    with pytest.raises(UserError, match=r"compute\.mirror: .* cannot be written"):
        mirror.check()
    kept = Checkpoints(tmp_path / "runs" / "c", is_main=True, mirror=mirror)
    kept.save(STATE)
    kept.flush()
    assert kept.newest() is not None
    assert "was not copied" in caplog.text
    kept.close()


def test_old_copies_stay_while_new_ones_fail(tmp_path, monkeypatch):
    here, there = tmp_path / "runs", tmp_path / "far"
    mirror = Mirror(there.as_uri(), here)
    kept = Checkpoints(here / "c", is_main=True, mirror=mirror)
    for value in range(2):
        kept.save(numbered(value))
    kept.flush()
    before = sorted(p.name for p in (there / "c").iterdir())
    monkeypatch.setattr(mirror, "put", lambda path: False)
    for value in range(2, 5):
        kept.save(numbered(value))
    kept.close()
    assert sorted(p.name for p in (there / "c").iterdir()) == before
    assert len(before) == 2


@pytest.mark.parametrize("uri", ["", "nowhere", "relative/folder", "gopher://host/x"])
def test_addresses_that_are_no_mirror(uri, tmp_path):
    with pytest.raises(UserError, match=r"compute\.mirror"):
        Mirror(uri, tmp_path).check()
