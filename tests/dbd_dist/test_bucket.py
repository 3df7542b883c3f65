"""Runs whose storage is a bucket, on a server of their own that speaks S3."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from s3_server import BUCKET, KEYS, Server, free_port

from data_prep.errors import UserError
from data_prep.io.hashes import sha256_file
from dbd_dist.cli import main
from dbd_dist.runtime.bucket.address import address_of
from dbd_dist.runtime.bucket.folder import check_torchrun, is_for_one_node, staging_folder
from dbd_dist.runtime.bucket.upload import Upload
from dbd_dist.runtime.mirror import Mirror

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"time_s", "images_per_s"}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.end()


@pytest.fixture
def env(server, tmp_path, monkeypatch):
    """Where this test's commands find the server, and stage."""
    places = {"AWS_ENDPOINT_URL": server.endpoint, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name, value in (KEYS | places).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "DBD_STAGING"):
        monkeypatch.delenv(name, raising=False)


def command(digits: Path, storage: str | Path, *more: str) -> list[str]:
    return [
        "train", "smoke", "--data", str(digits), "--storage", str(storage), "--name", "run", "--launcher", "local",
        "--compute.threads", "1", "--compute.precision", "fp32", "--simclr.batch", "60", "--warmup.batch", "60",
        "--mixmatch.epochs", "16", *more,
    ]  # fmt: skip


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dbd_dist.cli", *argv], cwd=ROOT, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition, what: str, limit_s: float = 120.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def newest(server: Server, prefix: str) -> str:
    """The newest checkpoint of a run in the bucket; "" where there is none."""
    return max(server.names(f"{prefix}/run/checkpoints"), default="")


def outcome(folder: Path) -> tuple[str, list[dict], dict]:
    """The weights' hash, the rows of the metrics, and the measured figures."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    figures = {name: result[name] for name in ("clean_acc", "asr", "robust_acc", "kept", "kept_poisoned", "data_hash")}
    return sha256_file(folder / "model.safetensors"), [_untimed(row) for row in rows], figures


def _untimed(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES | {"reused"}}


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory) -> Path:
    """The same run on disk."""
    storage = tmp_path_factory.mktemp("undisturbed")
    assert main(command(digits, storage)) == 0
    return storage / "run"


# -- whole runs


def test_a_run_in_a_bucket_is_that_on_disk(server, env, digits, undisturbed, tmp_path, capsys):
    storage = f"s3://{BUCKET}/whole"
    assert main(command(digits, storage)) == 0
    assert capsys.readouterr().out.endswith(f"{storage}/run\n")
    assert outcome(server.download("whole/run", tmp_path / "copy")) == outcome(undisturbed)
    on_disk = {str(p.relative_to(undisturbed)) for p in undisturbed.rglob("*") if p.is_file()}
    assert without_events(server.names("whole/run")) == without_events(on_disk)
    assert len(server.names("whole/stages")) == 2
    staged = staging_folder(storage)
    assert not (staged / "run").exists()

    shutil.rmtree(staged)  # another machine
    before = server.read("whole/run/result.json")
    assert main(command(digits, storage)) == 0
    assert server.read("whole/run/result.json") == before
    assert not (staged / "stages").exists()  # nothing was needed, and nothing trained

    assert main(["report", f"{storage}/run", "--format", "md"]) == 0
    assert "DBD" in capsys.readouterr().out
    assert main(["evaluate", f"{storage}/run"]) == 0
    assert json.loads(capsys.readouterr().out)["clean_acc"] == outcome(undisturbed)[2]["clean_acc"]

    assert main(command(digits, storage, "--name", "other", "--split.keep", "0.4")) == 0
    assert json.loads(server.read("whole/other/result.json"))["reused_stages"] == ["simclr", "warmup"]


def without_events(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("tensorboard/")}


@pytest.mark.parametrize("lost", [True, False], ids=["empty-disk", "same-disk"])
def test_a_killed_run_ends_with_the_undisturbed_weights(server, env, digits, undisturbed, tmp_path, lost):
    storage, prefix = f"s3://{BUCKET}/killed-{lost}", f"killed-{lost}"
    words = command(digits, storage)
    running = start(*words)
    try:
        wait_until(lambda: newest(server, prefix) >= "checkpoint_000003.pt", "nothing was uploaded")
    finally:
        running.kill()
        running.communicate()
    names = server.names(f"{prefix}/run")
    assert "run.json" in names
    assert "result.json" not in names
    if lost:
        shutil.rmtree(staging_folder(storage))
    assert main(words) == 0
    copy = server.download(f"{prefix}/run", tmp_path / "copy")
    assert outcome(copy) == outcome(undisturbed)
    events = [json.loads(line) for line in (copy / "logs" / "rank0.jsonl").read_text().splitlines()]
    resumed = [event["checkpoint"] for event in events if event["event"] == "resumed"]
    assert resumed
    assert resumed[0] >= "checkpoint_000003.pt"


def test_a_stopped_run_is_uploaded_before_the_command_ends(server, env, digits):
    running = start(*command(digits, f"s3://{BUCKET}/stopped", "--simclr.epochs", "500"))
    wait_until(lambda: newest(server, "stopped") > "", "nothing was uploaded")
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "stopped after simclr" in said
    here = staging_folder(f"s3://{BUCKET}/stopped") / "run" / "checkpoints"
    assert {p.name for p in here.iterdir()} == server.names("stopped/run/checkpoints")
    for path in here.iterdir():
        assert path.read_bytes() == server.read(f"stopped/run/checkpoints/{path.name}")


@pytest.mark.ray
def test_a_ray_run_in_a_bucket_is_stopped_and_resumes_elsewhere(server, env, digits, undisturbed, tmp_path):
    """On a machine with an empty disk and no Ray."""
    storage = f"s3://{BUCKET}/ray"
    running = start(*command(digits, storage, "--launcher", "ray", "--compute.workers", "1"))
    rows = staging_folder(storage) / "run" / "metrics.jsonl"  # uploads come later, perhaps when the run has ended
    wait_until(lambda: rows.exists() and rows.read_text() != "", "nothing was trained", limit_s=240.0)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 143, said
    names = server.names("ray/run")
    assert any(name.startswith("checkpoints/") for name in names)
    assert "result.json" not in names
    shutil.rmtree(staging_folder(storage))
    assert main(command(digits, storage)) == 0
    copy = server.download("ray/run", tmp_path / "copy")
    assert outcome(copy) == outcome(undisturbed)
    assert not any(name.startswith("ray/") for name in server.names("ray/run"))
    assert "resumed" in (copy / "logs" / "rank0.jsonl").read_text()


def test_a_server_that_goes_away_costs_nothing_that_is_on_disk(env, digits, undisturbed, tmp_path, monkeypatch, capsys):
    port = free_port()
    first, storage = Server(port=port), f"s3://{BUCKET}/away"
    monkeypatch.setenv("AWS_ENDPOINT_URL", first.endpoint)
    words = command(digits, storage, "--compute.patience-s", "3")
    running = start(*words)
    rows = staging_folder(storage) / "run" / "metrics.jsonl"
    wait_until(lambda: rows.exists() and rows.read_text() != "", "nothing was trained")
    first.end()
    _, said = running.communicate(timeout=120)
    assert running.returncode == 2, said
    assert said.count("error: ") == 1
    assert "is not uploaded whole: the server cannot be reached" in said
    assert outcome(staging_folder(storage) / "run") == outcome(undisturbed)

    second = Server(port=port)  # empty, as this server keeps nothing
    try:
        assert main(words) == 0
        assert outcome(second.download("away/run", tmp_path / "copy")) == outcome(undisturbed)
    finally:
        second.end()


# -- what is refused


def refused(words: list[str], capsys) -> str:
    """The one message of a command that starts nothing."""
    began = time.monotonic()
    assert main(words) == 2
    assert time.monotonic() - began < 60
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Expected: " in said.err
    return said.err


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("s3://missing/x", "there is no such bucket"),
        ("s4://bucket/x", "the scheme s4 is not known"),
        ("file:///x", "the scheme file is not known"),
        ("s3://", "no bucket is named"),
        ("s3://bucket/x?colour=red", "options that are not known: colour"),
        ("s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http", "the server cannot be reached"),
        ("s3://bucket/x?endpoint_override=nowhere.invalid&scheme=http", "the server cannot be reached"),
    ],
)
def test_storages_that_cannot_be(env, digits, storage, words, capsys, tmp_path):
    assert words in refused(command(digits, storage), capsys)
    assert not (tmp_path / "cache" / "dbd-dist" / "storage").exists()


def test_a_bucket_of_others_is_refused(env, digits, capsys, monkeypatch):
    strict, words = Server(), command(digits, f"s3://{BUCKET}/x")
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.endpoint)
        without_rights = strict.begin_to_check_rights()
        said = refused(words, capsys)
        assert "the credentials are missing or not accepted" in said
        assert "AWS_ACCESS_KEY_ID" in said
        for name, value in without_rights.items():
            monkeypatch.setenv(name, value)
        assert "access is denied" in refused(words, capsys)
    finally:
        strict.end()


def test_a_server_that_never_answers_is_refused_in_time(env, digits, capsys, monkeypatch):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert "the server cannot be reached" in refused(command(digits, f"s3://{BUCKET}/x"), capsys)


@pytest.mark.parametrize("words", [["tune", "filter"], ["demo"], ["reproduce", "main"]], ids=lambda words: words[0])
def test_other_commands_take_folders(env, words, capsys):
    assert main([*words, "--storage", f"s3://{BUCKET}/x"]) == 2
    assert "`dbd train` alone keeps runs in a bucket" in capsys.readouterr().err


def test_a_page_on_a_bucket_needs_a_file(env, capsys):
    assert main(["report", f"s3://{BUCKET}/x/run"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["report", f"s3://{BUCKET}/x/run", "--format", "md"]) == 2
    assert "there is no such run" in capsys.readouterr().err


def test_another_run_of_that_name_is_not_overwritten(server, env, digits, capsys):
    storage = f"s3://{BUCKET}/named"
    assert main(command(digits, storage, "--stop-after", "simclr")) == 0
    files = server.files()
    with files.open_output_stream(f"{BUCKET}/named/run/run.json") as file:
        file.write(b"{}")
    capsys.readouterr()
    assert main(command(digits, storage)) == 2
    assert "is not the one in s3://bucket/named/run" in capsys.readouterr().err
    assert server.read("named/run/run.json") == b"{}"


# -- parts


@pytest.mark.parametrize("text", ["runs", "/runs", "~/runs", "a:b", "s3", "C:", "./s3:x"])
def test_folders_are_no_addresses(text):
    assert address_of(text) is None


def test_an_address_survives_pathlib():
    assert address_of(Path("s3://bucket/a/b")) == "s3://bucket/a/b" == address_of("s3://bucket/a/b/")
    with pytest.raises(UserError, match="no bucket"):
        address_of(Path("s3://"))


def test_two_servers_are_two_folders(env, monkeypatch, tmp_path):
    one = staging_folder("s3://bucket/x")
    assert one == staging_folder("s3://bucket/x") != staging_folder("s3://bucket/y")
    assert is_for_one_node(one)
    assert not is_for_one_node(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://other")
    assert staging_folder("s3://bucket/x") != one
    monkeypatch.setenv("DBD_STAGING", str(tmp_path / "shared"))
    assert staging_folder("s3://bucket/x").parent == tmp_path / "shared"
    assert not is_for_one_node(staging_folder("s3://bucket/x"))


def test_torchrun_over_nodes_needs_a_shared_folder(env, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="DBD_STAGING"):
        check_torchrun()
    monkeypatch.setenv("DBD_STAGING", str(tmp_path))
    check_torchrun()


class Recorded(Mirror):
    """A mirror that notes what it is asked for, in order; of files that it fails at, too."""

    def __init__(self, root: Path):
        super().__init__((root.parent / "far").as_uri(), root)
        self.calls: list[str] = []
        self.fails: str | None = None

    def send(self, path: Path) -> None:
        self.calls.append(path.name)
        if path.name == self.fails:
            raise OSError("AWS Error NETWORK_CONNECTION")
        super().send(path)

    def remove(self, path: Path) -> None:
        self.calls.append(f"-{path.name}")
        super().remove(path)


def made_run(storage: Path) -> Path:
    run = storage / "run"
    for name in (
        "run.json", "result.json", "model.json", "model.safetensors", "metrics.jsonl", "progress.json", ".lock",
        "checkpoints/checkpoint_000001.pt", "checkpoints/checkpoint_000002.pt", "ray/x", "below/run.json",
    ):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    return run


def test_the_mark_of_a_whole_run_comes_last(tmp_path):
    run, mirror = made_run(tmp_path / "here"), Recorded(tmp_path / "here")
    old = run / "checkpoints" / "checkpoint_000000.pt"
    upload = Upload(mirror, tmp_path / "here", run, {old: 1})
    upload.start()
    assert upload.finish(0.0)
    assert mirror.calls == [
        "run.json", "checkpoint_000001.pt", "checkpoint_000002.pt", "-checkpoint_000000.pt", "metrics.jsonl",
        "model.safetensors", "model.json", "result.json",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["checkpoint_000002.pt", "model.safetensors"])
def test_a_file_that_fails_keeps_the_mark_back_and_old_checkpoints(tmp_path, fails, caplog):
    run, mirror = made_run(tmp_path / "here"), Recorded(tmp_path / "here")
    mirror.fails = fails
    old = run / "checkpoints" / "checkpoint_000000.pt"
    upload = Upload(mirror, tmp_path / "here", run, {old: 1})
    upload.start()
    assert not upload.finish(0.0)
    assert "result.json" not in mirror.calls
    assert ("-checkpoint_000000.pt" in mirror.calls) == (fails == "model.safetensors")
    assert upload.reason.startswith("the server cannot be reached")
    assert caplog.text.count("cannot be written") == 1
