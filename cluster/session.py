"""Connecting to Ray: to the cluster that this process belongs to, or to one of its own on this machine.

A cluster is found by RAY_ADDRESS (set inside a submitted job) or by the note that `ray start` leaves on its
host. Connecting says nothing of CPUs or addresses: Ray refuses both there. Otherwise a Ray of our own is
started, with its dashboard (Tune frees the resources of stopped trials through it) on the loopback address,
and guarded by a token.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .errors import ClusterError

# Left to itself, a local ray.init() writes a token into the home folder and so turns authentication on for
# every later `ray start` there. The token of our own Ray lives in a private folder, and goes with it.
AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def quiet_env(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables for any Ray process; what the user set wins."""
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default; unset, it warns in every worker
    }
    return {name: value for name, value in wanted.items() if name not in environ}


def token_env(environ: Mapping[str, str], token_path: Path) -> dict[str, str]:
    """Variables that switch token authentication on for a Ray of our own; what the user set wins."""
    mode = environ.get("RAY_AUTH_MODE")
    if mode not in (None, "", "token", "disabled"):
        raise ClusterError(f"The mode {mode!r} is not known", where="RAY_AUTH_MODE", allowed="token, disabled")
    if mode == "disabled":
        return {}
    if environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH"):
        return {"RAY_AUTH_MODE": "token"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}


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
    worker_logs: bool = False,
) -> Iterator[bool]:
    """Inside the block, Ray is connected; yields True for a cluster, False for a Ray started here.

    A connection that exists already is used, and left open.

    Args:
        num_cpus: for a Ray of our own; all that there are when left out.
        worker_logs: print the workers' output here too.
    """
    import ray
    from ray.exceptions import AuthenticationError, RaySystemError

    if ray.is_initialized():
        yield True
        return
    before = {name: os.environ.get(name) for name in AUTH_VARIABLES}
    os.environ.update(quiet_env(os.environ))
    quiet = {"log_to_driver": worker_logs, "logging_level": "warning", "runtime_env": runtime_env}
    address = cluster_address(os.environ)
    private = None
    try:
        if address is not None:
            try:
                ray.init(**quiet)
            except (
                ConnectionError,
                RaySystemError,
                AuthenticationError,
            ) as error:
                raise ClusterError(
                    f"Ray cannot be reached ({textwrap.shorten(str(error), 160, placeholder='...')})",
                    where=address,
                    fix="check that it runs and that RAY_AUTH_MODE and the token are its own; "
                    "RAY_ADDRESS=local starts a Ray here instead",
                ) from error
        else:
            private = Path(tempfile.mkdtemp(prefix="dbd-ray-"))  # mode 700
            _write_token(private / "token")
            os.environ.update(token_env(os.environ, private / "token"))
            _reread_environment()
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                **quiet,
            )
        yield address is not None
    finally:
        ray.shutdown()
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _answers(address: str) -> bool:
    """The note outlives a cluster that was killed: `ray stop` alone removes it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def _write_token(path: Path) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))


def _reread_environment() -> None:
    """Ray keeps the authentication mode and the token that it saw when it was imported."""
    from ray import _raylet  # compiled: the type checker cannot look inside

    loader = getattr(_raylet, "AuthenticationTokenLoader")  # noqa: B009
    getattr(_raylet, "Config").initialize("")  # noqa: B009
    loader.instance().reset_cache()
