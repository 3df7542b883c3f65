"""The soak test in short: one run that loses a worker, its command and its raylet, and ends as if nothing had happened.
`make soak` is the long version; Ray Train's controller is killed in test_launch.py too."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest

from dbd_dist.config import override
from tests import soak


@pytest.fixture(scope="module")
def config(digits):
    """Of stages that are as long as their kill needs: that the raylet has ended is seen a second later, by a command
    that must not have finished by then."""
    return override(
        soak.configurations(digits)["dbd-1"], {"simclr.epochs": 5, "warmup.epochs": 10, "mixmatch.epochs": 40}
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_lost_everything_once(config, tmp_path):
    undisturbed = soak.run("dbd-1", config, tmp_path / "undisturbed", flags=["--launcher", "local"])
    assert undisturbed.failures == []
    expected = soak.outcome(tmp_path / "undisturbed" / "storage")
    assert soak.check(tmp_path / "undisturbed" / "storage", expected, config) == []

    kills = [
        soak.Kill(victim="worker", moment="early", after=("simclr", 3), delay_s=0.0),
        soak.Kill(victim="driver", moment="middle", after=("warmup", 5), delay_s=0.1),
        soak.Kill(victim="raylet", moment="late", after=("mixmatch", 2), delay_s=0.0),
    ]
    record = soak.run("dbd-1", config, tmp_path / "disturbed", kills, await_agents=False)
    assert [kill["victim"] for kill in record.kills if "killed" in kill] == ["worker", "driver", "raylet"]
    assert [attempt["code"] for attempt in record.attempts] == [-signal.SIGKILL, 1, 0]
    says = [attempt["errors"] for attempt in record.attempts]
    assert [len(errors) for errors in says] == [0, 1, 0]
    assert "raylet, (pid" in says[1][0]
    assert "was ended by SIGKILL" in says[1][0]
    assert "the same command resumes from" in says[1][0]
    assert record.failures + soak.check(tmp_path / "disturbed" / "storage", expected, config) == []


# -- what the soak test itself rests on


@pytest.mark.parametrize("method", ["dbd", "none"])
def test_every_victim_meets_every_moment(digits, method):
    config = soak.configurations(digits)["none-2" if method == "none" else "dbd-2"]
    kills = [soak.draw(0, number, config) for number in range(50)]
    assert Counter((k.victim, k.moment) for k in kills) == {(v, m): 2 for v in soak.VICTIMS for m in soak.MOMENTS}
    assert {k.victim for k in kills[:5]} == set(soak.VICTIMS)
    assert all(k.after is None or k.after in soak.epochs_of(config) for k in kills)
    if method == "dbd":
        assert {k.after[0] for k in kills if k.after} == {"simclr", "warmup", "mixmatch"}
    assert [soak.draw(0, number, config) for number in range(50)] == kills
    assert [soak.draw(1, number, config) for number in range(50)] != kills


@pytest.mark.parametrize(
    ("text", "code", "killed", "wrong"),
    [
        ("fine\n", 0, False, []),
        ("error: x\n", 1, False, []),
        ("", -9, True, []),
        ("", 1, False, ["exit code 1 with 0 messages"]),
        ("error: x\nerror: y\n", 1, False, ["exit code 1 with 2 messages"]),
        ("error: x\n", 0, False, ["exit code 0 with 1 messages"]),
        ("", -11, False, ["exit code -11 with 0 messages", "exit code -11"]),
        ("error: x\nTraceback (most recent call last):\n", 1, False, ["a traceback"]),
        ("\x1b[33m(raylet)\x1b[0m Raylet is", 0, False, ["1 lines of Ray's own"]),
        ("[2026-11-25 11:23:48,674 E 1 2] rpc_client.h", 0, False, ["1 lines of Ray's own"]),
    ],
)
def test_what_a_command_may_say(text, code, killed, wrong):
    found = soak._said(text, code, killed)
    assert len(found) == len(wrong)
    assert all(says.startswith(expected) for says, expected in zip(found, wrong, strict=True))


def test_differences_from_the_undisturbed_run_are_found(config, tmp_path):
    folder = tmp_path / soak.RUN
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "result.json").write_text(json.dumps({"clean_acc": 0.5, "seconds": {"simclr": 1.0}}))
    rows = [{"stage": stage, "epoch": epoch, "time_s": 1.0, "loss": 2.0} for stage, epoch in soak.epochs_of(config)]

    def differs(rows) -> list[str]:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [line for line in soak.check(tmp_path, expected, config) if "split" not in line]

    expected = {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = soak.outcome(tmp_path)
    assert differs([row | {"time_s": 3.0} for row in rows]) == []
    assert differs(rows[:-1])[0].startswith("epochs: ")
    assert differs([*rows, rows[-1]])[0].startswith("epochs: ")
    assert differs([rows[0] | {"loss": 2.1}, *rows[1:]]) == ["rows differs"]
    (folder / ".left").write_text("")
    assert differs(rows) == ["files differs", f"file +{soak.RUN}/.left"]
    (folder / ".left").unlink()
    (folder / "model.safetensors").write_bytes(b"others")
    assert differs(rows) == ["bytes differs", "bytes: model.safetensors"]
