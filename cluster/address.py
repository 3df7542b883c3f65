"""Which Ray cluster this process belongs to, and whether one answers there."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from data_prep.errors import UserError

VARIABLE = "RAY_ADDRESS"
PROBE_S = 5.0
"""How long a head may take to answer, twice: to take a connection, and to greet."""
EXPECTED = "HOST:PORT of Ray's head, such as 10.0.0.1:6379; local for a Ray of this machine's own"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What every gRPC client opens with (RFC 9113, 3.4): the preface of HTTP/2 and an empty frame of settings."""
SETTINGS_FRAME = 4


def cluster_address(environ: Mapping[str, str]) -> str | None:
    """The cluster that this process belongs to, or None."""
    address = environ.get(VARIABLE, "").strip()
    if address == "local":
        return None
    if address:
        return address
    folder = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp"
    note = Path(folder) / "ray" / "ray_current_cluster"
    noted = note.read_text().strip() if note.is_file() else ""
    return noted if noted and answers(noted) else None


def check(address: str) -> None:
    """Refuse an address at which Ray would hang, within some seconds.

    Raises:
        UserError: it is none, it is a dashboard's, nothing listens there, or what listens there is no head of Ray's.
    """
    if address == "auto":
        return
    scheme, colon, rest = address.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(
            f"{address!r} is the address of a dashboard, for jobs",
            where=VARIABLE,
            expected=EXPECTED,
            hint=f"dbd submit --address {address} -- COMMAND ... runs a command there as a job",
        )
    match = re.fullmatch(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:.]+\]):(?P<port>\d{1,5})/?", rest)
    if (colon and scheme != "ray") or match is None or not 0 < int(match["port"]) < 65536:
        raise UserError(f"{address!r} is no address of a Ray cluster", where=VARIABLE, expected=EXPECTED)
    try:
        greets = _greets(match["host"].strip("[]"), int(match["port"]))
    except OSError as error:
        raise UserError(
            f"nothing answers at {address} ({error.strerror or error})",
            where=VARIABLE,
            hint="check that the cluster is up and its port reachable; RAY_ADDRESS=local starts a Ray here instead",
        ) from error
    if not greets:
        raise UserError(f"what listens at {address} is no head of a Ray cluster", where=VARIABLE, expected=EXPECTED)


def _greets(host: str, port: int) -> bool:
    """Whether a gRPC server listens there; OSError where nothing does."""
    with socket.create_connection((host, port), timeout=PROBE_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
            return True  # it greets after a handshake with certificates, which Ray makes
        connection.sendall(PREFACE)
        answer = b""
        while len(answer) < 9:
            try:
                part = connection.recv(9 - len(answer))
            except OSError:
                return False
            if not part:
                return False
            answer += part
        return answer[3] == SETTINGS_FRAME


def answers(address: str) -> bool:
    """Whether something listens there: the note outlives a cluster that was killed, only `ray stop` removes it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False
