"""Addresses of Ray clusters: what is refused, and how soon. No Ray is started."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from cluster import address, session
from data_prep.errors import UserError
from dbd_dist.cli import main


@contextmanager
def listening(answer: bytes | None) -> Iterator[str]:
    """A server that answers whoever connects with some bytes, or never."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                if answer is not None:
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("http://10.0.0.1:8265", "is the address of a dashboard"),
        ("https://ray.example", "dbd submit --address https://ray.example"),
        ("nonsense", "is no address of a Ray cluster"),
        ("10.0.0.1", "Expected: HOST:PORT"),
        ("10.0.0.1:port", "is no address"),
        ("10.0.0.1:99999", "is no address"),
        ("anyscale://10.0.0.1:6379", "is no address"),
        ("host name:6379", "is no address"),
        ("ray.invalid:6379", "nothing answers at ray.invalid:6379"),
    ],
)
def test_what_is_no_address(given, words):
    with pytest.raises(UserError, match=r"RAY_ADDRESS: ") as caught:
        address.check(given)
    assert words in str(caught.value)


def test_nothing_listens():
    with pytest.raises(UserError, match=r"nothing answers at 127.0.0.1:\d+ .*RAY_ADDRESS=local"):
        address.check(f"127.0.0.1:{free_port()}")


def test_a_port_of_something_else(monkeypatch):
    monkeypatch.setattr(address, "PROBE_S", 0.3)
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x", None):
        with listening(answer) as place, pytest.raises(UserError, match="is no head of a Ray cluster"):
            address.check(place)


def test_a_grpc_server_is_taken_for_a_head():
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address.check(f"127.0.0.1:{port}")
        address.check(f"ray://127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_the_command_says_so_before_it_does_anything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "connect", lambda **_: pytest.fail("no Ray is tried"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    start = time.monotonic()
    assert main(["train", "smoke", "--storage", str(tmp_path)]) == 2
    assert time.monotonic() - start < 60
    message = capsys.readouterr().err
    assert message.startswith("error: RAY_ADDRESS: nothing answers at")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
