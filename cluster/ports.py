"""Whether the nodes of a cluster reach each other, on ports such as gloo, NCCL and Ray's workers take."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .machine import Finding

TIMEOUT_S = 3.0

Place = tuple[str, str, int]
"""Name of a node, its address, and a port that listens there."""


class Listener:
    """Listens on a port that the system chooses, on every interface, until it is deleted. Made on each node."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))

    def port(self) -> int:
        return self._server.getsockname()[1]


def reach(places: Sequence[Place]) -> tuple[str, str, str, str]:
    """The fields of a finding: whether connections open from here to all of these."""
    with ThreadPoolExecutor(min(32, max(1, len(places)))) as pool:
        reasons = list(pool.map(_reason, places))
    closed = [f"{name} on port {port} ({why})" for (name, _, port), why in zip(places, reasons) if why is not None]
    found = Finding("ports", "ok", f"{len(places)} other nodes reached")
    if closed:
        remedy = "open TCP between the nodes: Ray, gloo and NCCL choose ports as they need them"
        found = Finding("ports", "fail", f"cannot connect to {'; '.join(closed)}", remedy)
    return found.name, found.status, found.detail, found.remedy


def _reason(place: Place) -> str | None:
    _, address, port = place
    try:
        socket.create_connection((address, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
