"""`dbd submit` against a server that answers as a dashboard does; against a real one in test_jobs.py."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import jobs
from data_prep.errors import UserError
from dbd_dist.cli import main

TOKEN = "t" * 64


@contextmanager
def dashboard(token: str | None = None, body: str = '{"ray_version": "2.60.0"}') -> Iterator[str]:
    """Answers /api/version as Ray's does: 401 without a token where it wants one, 403 to a wrong one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            shown = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            code = 200 if token is None or shown == token else 403 if shown else 401
            self.send_response(code if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_token_here(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `dbd submit` with what must be refused, and nothing submitted; gives the message."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(jobs, "submit", lambda *_, **__: pytest.fail("something was submitted"))
        assert main(["submit", *argv]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command is given"),
        (["--"], "no command is given"),
        (["--", "trian", "demo"], "did you mean 'train'"),
        (["--", "submit"], "there is no command 'submit'"),
        (["--address", "10.0.0.1:6379", "--", "train", "demo"], "is no address of a dashboard"),
        (["--address", "ftp://x", "--", "train", "demo"], "Expected: http://HOST:8265"),
        (["--env", "A", "--", "train", "demo"], "Expected: NAME=VALUE"),
        (["--working-dir", "/nowhere", "--", "train", "demo"], "--working-dir /nowhere: is no folder"),
        (["--address", "http://ray.invalid:8265", "--", "train", "demo"], "no dashboard answers"),
    ],
)
def test_mistakes_are_one_message(refused, argv, words):
    assert words in refused(*argv)


def test_nothing_or_something_else_listens(refused):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert "no dashboard answers" in refused("--address", f"http://127.0.0.1:{port}", "--", "train", "demo")
    with dashboard(body="<html>") as address:
        assert "no dashboard answers" in refused("--address", address, "--", "train", "demo")
    with dashboard(body="{}") as address:
        assert "no dashboard of Ray's" in refused("--address", address, "--", "train", "demo")


def test_tokens(refused, monkeypatch, tmp_path):
    with dashboard(TOKEN) as address:
        argv = ("--address", address, "--", "train", "demo")
        assert "wants a token" in refused(*argv)
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("x" * 64)  # found without being named
        assert "does not take this token" in refused(*argv)
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        assert "the token cannot be read" in refused(*argv)
        jobs.check(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN})


def test_the_environment_names_the_address():
    named = jobs.address_from
    assert named(None, {}) == jobs.DEFAULT_ADDRESS
    assert named(None, {"RAY_ADDRESS": "10.0.0.1:6379"}) == jobs.DEFAULT_ADDRESS
    assert named(None, {"RAY_ADDRESS": "http://a:1/"}) == "http://a:1"
    assert named(None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:1"}) == "http://b:1"
    assert named("https://c", {"RAY_API_SERVER_ADDRESS": "http://b:1"}) == "https://c"


class Client:
    """Stands for Ray's client: one job, which writes two lines and ends so."""

    def __init__(self, status: str, code: int | None, interrupt: bool = False):
        self.info = SimpleNamespace(status=status, driver_exit_code=code, message="it said so")
        self.interrupt, self.submitted = interrupt, {}

    def submit_job(self, **fields: object) -> str:
        self.submitted = fields
        return "raysubmit_1"

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if job_id != "raysubmit_1":
            raise RuntimeError("404")
        return self.info

    async def tail_job_logs(self, job_id: str):
        yield "one\n"
        if self.interrupt:
            raise KeyboardInterrupt
        yield "two\n"


@pytest.mark.parametrize(
    ("status", "code", "ends"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 1)]
)
def test_the_job_hands_back_its_exit_code(monkeypatch, capsys, status, code, ends):
    client = Client(status, code)
    monkeypatch.setattr(jobs, "_client", lambda address: client)
    with dashboard() as address:
        argv = ["submit", "--address", address, "--env", "A=b=c", "--cpus", "1", "--", "dbd", "train", "demo"]
        assert main([*argv, "--name", "a b"]) == ends
    out, err = capsys.readouterr()
    assert out == "one\ntwo\n"
    assert ("it said so" in err) == (ends != 0 and not code)
    assert client.submitted["entrypoint"] == "python -m dbd_dist train demo --name 'a b'"
    assert client.submitted["entrypoint_num_cpus"] == 1
    sent = client.submitted["runtime_env"]
    assert sent["env_vars"]["A"] == "b=c"
    assert sent["working_dir"] == str(Path(__file__).resolve().parents[2])
    assert {".git", "tests"} <= set(sent["excludes"])


def test_ctrl_c_detaches_and_says_how_to_return(monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_client", lambda address: Client("RUNNING", None, interrupt=True))
    with dashboard() as address:
        assert main(["submit", "--address", address, "--", "train", "demo"]) == jobs.DETACHED
        err = capsys.readouterr().err
        assert f"dbd submit --address {address} --follow raysubmit_1" in err
        assert f"ray job stop --address {address} raysubmit_1" in err


def test_a_job_that_is_not_there(monkeypatch):
    monkeypatch.setattr(jobs, "_client", lambda address: Client("RUNNING", None))
    with pytest.raises(UserError, match="there is no job 'nope'"):
        jobs.follow_job("http://x", "nope")


def test_requirements_reach_the_job():
    job = jobs.Job(command=["x"], pip=["/mnt/dbd_dist-0.2.0-py3-none-any.whl"])
    assert json.loads(json.dumps(job.runtime_env))["pip"] == ["/mnt/dbd_dist-0.2.0-py3-none-any.whl"]
    assert "working_dir" not in job.runtime_env
