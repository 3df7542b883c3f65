"""All-gather of small CPU tensors among ranks, by Unix sockets where all ranks are on one node, else by gloo.

Synchronised batch norm exchanges a few hundred bytes dozens of times a step, and every rank waits for each of them.
Gloo passes such a message through three threads on each side; beside other work on the cores each hand-over waits for
the scheduler. A socket that the training thread itself reads and writes takes one wake-up (figures: docs/speed.md).
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_PIECE = 1 << 16
"""Bytes sent before a rank reads: less than a socket buffers, so that no two ranks block in sending to each other."""
_links: dict[object, _Links | None] = {}
"""Of the process group that is up; None where its ranks are on several nodes."""


def all_gather(x: Tensor) -> Tensor:
    """(...) of one shape on every rank -> (size, ...) in rank order, the same bits on all ranks. Without gradient.

    Raises:
        ConnectionError: a rank has ended.
        TimeoutError: a rank did not answer within the process group's timeout.
    """
    links = _open()
    if links is not None:
        return links.all_gather(x)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.stack(parts)


def close() -> None:
    """Close what the first exchange opened."""
    for links in _links.values():
        if links is not None:
            links.close()
    _links.clear()


def _open() -> _Links | None:
    group = dist.group.WORLD
    if group not in _links:
        close()  # of a group that was left
        _links[group] = _connect()
    return _links[group]


class _Links:
    """A connected socket to every other rank."""

    def __init__(self, rank: int, peers: dict[int, socket.socket]):
        self._rank, self._peers = rank, peers

    def all_gather(self, x: Tensor) -> Tensor:
        out = torch.empty((len(self._peers) + 1, *x.shape), dtype=x.dtype)
        out[self._rank] = x
        rows = [memoryview(row).cast("B") for row in out.view(len(out), -1).view(torch.uint8).numpy()]
        mine = rows[self._rank]
        for start in range(0, len(mine), _PIECE):
            for peer in self._peers.values():
                peer.sendall(mine[start : start + _PIECE])
            for rank, peer in self._peers.items():
                _receive(peer, rows[rank][start : start + _PIECE])
        return out

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _receive(peer: socket.socket, into: memoryview) -> None:
    while into:
        count = peer.recv_into(into)
        if count == 0:
            raise ConnectionError("connection closed by peer: another rank has ended")
        into = into[count:]


def _connect() -> _Links | None:
    """Sockets among all ranks; None where they are not all on one Linux node. Every rank has to call it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    with socket.socket(socket.AF_UNIX) as listener:
        node, name = _node(), f"\0dbd-dist-{secrets.token_hex(16)}"
        if node is not None:
            listener.bind(name)
            listener.listen(size)
        everyone: list[tuple[str | None, str]] = [(None, "")] * size
        dist.all_gather_object(everyone, (node, name))
        if node is None or any(other != node for other, _ in everyone):
            return None
        timeout_s = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()  # type: ignore[union-attr]
        listener.settimeout(timeout_s)
        peers: dict[int, socket.socket] = {}
        for other, (_, address) in enumerate(everyone[:rank]):
            peers[other] = socket.socket(socket.AF_UNIX)
            peers[other].settimeout(timeout_s)
            peers[other].connect(address)
            peers[other].sendall(struct.pack("i", rank))
        while len(peers) < size - 1:
            peer, _ = listener.accept()
            if struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] != os.getuid():
                peer.close()  # abstract names have no permissions: another user of this machine may connect
                continue
            peer.settimeout(timeout_s)
            number = bytearray(4)
            _receive(peer, memoryview(number))
            peers[struct.unpack("i", number)[0]] = peer
    return _Links(rank, dict(sorted(peers.items())))


def _node() -> str | None:
    """What processes share that reach each other's sockets and know each other's user; None where that is unknown."""
    if sys.platform != "linux":
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.stat(f"/proc/self/ns/{name}").st_ino for name in ("net", "user")]
    except OSError:
        return None
    return f"{boot} {spaces} {os.getuid()}"
