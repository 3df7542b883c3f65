"""Connecting to Ray: to the cluster that this process belongs to, or to one of its own on this machine.

A cluster is found by RAY_ADDRESS (set inside a submitted job) or by the note that `ray start` leaves on its host; its
CPUs and address are its own, Ray refuses both there. Otherwise a Ray of our own is started (`cluster.own_ray`).

Our own Ray ends with this process, also when this process is killed: the kernel ends Ray's servers with their parent,
training workers end within 3 s of their raylet, and Ray's two agents a minute later.

Ray ends a process that is connected to it, from C++ and at best with a line of its log, up to some seconds after Ray
has ended; `Watch.lost` says so earlier, and `guard` from the start of a Ray of our own until there is a `Watch`.
"""

from __future__ import annotations

import os
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster import calls, guard, own_ray
from cluster.address import answers, check, cluster_address
from data_prep.errors import UserError

HEAD_MAY_BE_AWAY_S = 45.0
"""How long the head of a cluster may not answer: it may be restarted (KubeRay does), and after 60 s Ray ends us."""
CALLS_END_S = 3.0
"""How long calls that are under way when the connection is closed may take to notice it: measured, up to one second."""


def quiet_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for any Ray process; what the user set wins."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; unset, it warns in every worker
    }
    return {name: value for name, value in wanted.items() if name not in environ}


@contextmanager
def connect(
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    runtime_env: dict | None = None,
    dashboard: bool = False,
    worker_logs: bool = False,
) -> Iterator[bool]:
    """Inside the block, Ray is connected; yields True for a cluster, False for a Ray started here.

    A connection that exists already is used, and left open.

    Args:
        num_cpus: for a Ray of our own; all that there are when left out.
        dashboard: whether a Ray of our own has one. It takes ten processes and 7 s of two cores to start; Tune frees
            the resources of stopped trials through it.
        worker_logs: print the workers' output here too.

    Raises:
        UserError: the cluster cannot be reached; own_ray.StartError: a Ray of our own could not be started.
    """
    import ray

    if ray.is_initialized():
        yield True
        return
    os.environ.update(quiet_env(os.environ))
    quiet = {"log_to_driver": worker_logs, "logging_level": "warning", "runtime_env": runtime_env}
    address = cluster_address(os.environ)
    shown = _show_messages(worker_logs)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None:
            with _joined(address, quiet):
                _heed_sigterm(on_sigterm)
                yield True
        else:
            with own_ray.running(num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=dashboard, **quiet):
                _heed_sigterm(on_sigterm)
                yield False
    finally:
        calls.unfinished(CALLS_END_S)
        _show_messages(shown)


def joinable_address() -> str:
    """The address of the Ray that this process is connected to, for RAY_ADDRESS of processes that are to join it."""
    import ray

    return ray.get_runtime_context().gcs_address


@contextmanager
def _joined(address: str, options: dict[str, Any]) -> Iterator[None]:
    """Connect to a cluster, which ray.init finds as `cluster_address` does."""
    import ray

    check(address)
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises whatever its parts do
        hint = (
            "check that it runs and that RAY_AUTH_MODE and the token are its own; "
            "RAY_ADDRESS=local starts a Ray here instead"
        )
        if "uv run" in str(error) or "Package size" in str(error):
            hint = "under `uv run` Ray packs the working folder: RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 keeps it from that"
        raise UserError(
            f"Ray cannot be reached ({textwrap.shorten(str(error), 160, placeholder='...')})", where=address, hint=hint
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _heed_sigterm(handler: Any) -> None:
    """Put a handler of ours back, in whose place ray.init has put its own (exit code 15, without a word)."""
    if threading.current_thread() is threading.main_thread() and callable(handler):
        signal.signal(signal.SIGTERM, handler)


def has_dashboard() -> bool:
    """Whether the Ray that this process is connected to shows a dashboard."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    return bool(node is not None and node.address_info.get("webui_url"))


class Watch:
    """Says whether the Ray that this process is connected to is still there. For any thread, one at a time.

    To be polled every second or so. Polling reaps a killed raylet: Ray's workers exit once it is no zombie any more.
    """

    def __init__(self) -> None:
        from ray._private import worker

        node = getattr(worker, "_global_node", None)  # of a Ray client, there is none
        self._own = guard.own_processes()
        self._head = None if node is None or self._own else node.gcs_address
        self._raylet = None if node is None or self._own else node.raylet_socket_name
        self._answered = time.monotonic()
        guard.relieve()

    def lost(self) -> str | None:
        """What has ended, in words, if Ray cannot continue; else None."""
        ended = guard.ended(self._own)
        if ended is not None:
            return ended
        if self._raylet is not None and not _listens(self._raylet):
            return "the raylet of this machine does not answer any more"
        if self._head is None or answers(self._head):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > HEAD_MAY_BE_AWAY_S:
            return f"Ray's head at {self._head} has not answered for {HEAD_MAY_BE_AWAY_S:.0f} s"
        return None


def _listens(path: str) -> bool:
    """Whether a process listens on a socket of this machine."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # its queue is full: it is open
            return True
    return True


def _show_messages(wanted: bool) -> bool:
    """Whether Ray prints here what happens to its processes, with twenty lines of its log each; returns what was set
    before. `log_to_driver` does not cover these."""
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = wanted
    return before
