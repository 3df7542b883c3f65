"""Connecting to Ray: to the cluster that this process belongs to, or to one of its own on this machine.

A cluster is found by RAY_ADDRESS (set inside a submitted job) or by the note that `ray start` leaves on its host; its
CPUs and address are its own, Ray refuses both there. Otherwise a Ray of our own is started, on the loopback address and
guarded by a token.

Our own Ray ends with this process, also when this process is killed: the kernel ends Ray's servers with their parent,
training workers end within 3 s of their raylet, and Ray's two agents a minute later.

Ray ends a process that is connected to it, from C++ and with a line of its log, some seconds after Ray has ended;
`Watch.lost` says so earlier.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

# Left to itself, a local ray.init() writes a token into the home folder and so turns authentication on for
# every later `ray start` there. The token of our own Ray is never written: its processes inherit it.
AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

HEAD_MAY_BE_AWAY_S = 45.0
"""How long the head of a cluster may not answer: it may be restarted (KubeRay does), and after 60 s Ray ends us."""


def quiet_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for any Ray process; what the user set wins."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; unset, it warns in every worker
    }
    return {name: value for name, value in wanted.items() if name not in environ}


def token_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that switch token authentication on for a Ray of our own; what the user set wins."""
    mode = environ.get("RAY_AUTH_MODE")
    if mode not in (None, "", "token", "disabled"):
        raise UserError(f"unknown mode {mode!r}", where="RAY_AUTH_MODE", expected="token, disabled")
    if mode == "disabled":
        return {}
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return {"RAY_AUTH_MODE": "token"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def cluster_address(environ: Mapping[str, str]) -> str | None:
    """The cluster that this process belongs to, or None."""
    address = environ.get("RAY_ADDRESS", "").strip()
    if address == "local":
        return None
    if address:
        return address
    note = Path(environ.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"
    noted = note.read_text().strip() if note.is_file() else ""
    return noted if noted and _answers(noted) else None


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
        UserError: the cluster cannot be reached; StartError: a Ray of our own could not be started.
    """
    import ray

    if ray.is_initialized():
        yield True
        return
    before = {name: os.environ.get(name) for name in AUTH_VARIABLES}
    os.environ.update(quiet_env(os.environ))
    quiet = {"log_to_driver": worker_logs, "logging_level": "warning", "runtime_env": runtime_env}
    address = cluster_address(os.environ)
    shown = _show_messages(worker_logs)
    try:
        if address is not None:
            _join(address, quiet)
        else:
            _start(num_cpus=num_cpus, num_gpus=num_gpus, include_dashboard=dashboard, **quiet)
        yield address is not None
    finally:
        ray.shutdown()
        _show_messages(shown)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to a cluster, which ray.init finds as `cluster_address` does."""
    import ray
    from ray.exceptions import AuthenticationError, RaySystemError

    try:
        ray.init(**options)
    except (ConnectionError, RaySystemError, AuthenticationError) as error:
        raise UserError(
            f"Ray cannot be reached ({textwrap.shorten(str(error), 160, placeholder='...')})",
            where=address,
            hint="check that it runs and that RAY_AUTH_MODE and the token are its own; "
            "RAY_ADDRESS=local starts a Ray here instead",
        ) from error


def _start(**options: Any) -> None:
    """Start a Ray of our own."""
    import ray

    os.environ.update(token_env(os.environ))
    _reread_environment()
    try:
        ray.init(address="local", dashboard_host="127.0.0.1", **options)
    except Exception as error:  # Ray raises whatever its parts do
        what = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
        raise StartError(f"Ray could not be started ({what})", hint="the same command starts again") from error


class StartError(UserError):
    """A Ray of our own could not be started, and not by a mistake of the user."""

    exit_code = 1


class Watch:
    """Says whether the Ray that this process is connected to is still there. For any thread, one at a time.

    To be polled every second or so. Polling reaps a killed raylet: Ray's workers exit once it is no zombie any more.
    """

    def __init__(self) -> None:
        from ray._private import worker

        node = getattr(worker, "_global_node", None)  # of a Ray client, there is none
        self._own = _own_processes()
        self._head = None if node is None or self._own else node.gcs_address
        self._raylet = None if node is None or self._own else node.raylet_socket_name
        self._answered = time.monotonic()

    def lost(self) -> str | None:
        """What has ended, in words, if Ray cannot continue; else None."""
        for name, process in self._own:
            code = process.poll()
            if code is not None:
                return f"{name} (pid {process.pid}) {how_it_ended(code)}"
        if self._raylet is not None and not _listens(self._raylet):
            return "the raylet of this machine does not answer any more"
        if self._head is None or _answers(self._head):
            self._answered = time.monotonic()
        elif time.monotonic() - self._answered > HEAD_MAY_BE_AWAY_S:
            return f"Ray's head at {self._head} has not answered for {HEAD_MAY_BE_AWAY_S:.0f} s"
        return None


def how_it_ended(code: int) -> str:
    """An exit code as `subprocess` gives it, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _own_processes() -> list[tuple[str, subprocess.Popen]]:
    """Processes of the Ray that this process started, those that it cannot do without first; elsewhere none."""
    from ray._private import worker

    node = getattr(worker, "_global_node", None)
    if node is None:
        return []
    needed = {"gcs_server": "Ray's head process, gcs_server,", "raylet": "Ray's process for this machine, raylet,"}
    return [(phrase, info.process) for kind, phrase in needed.items() for info in node.all_processes.get(kind, ())]


def _answers(address: str) -> bool:
    """Whether a head listens there: the note outlives a cluster that was killed, only `ray stop` removes it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


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


def _reread_environment() -> None:
    """Ray keeps the authentication mode and the token that it saw when it was imported."""
    from ray import _raylet  # compiled: the type checker cannot look inside

    loader = getattr(_raylet, "AuthenticationTokenLoader")  # noqa: B009
    getattr(_raylet, "Config").initialize("")  # noqa: B009
    loader.instance().reset_cache()
