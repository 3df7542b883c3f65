"""A Ray of our own: on the loopback address, in a folder that only its user enters, guarded by a token.

What stays open: its servers and workers listen on 127.0.0.1, so every user of this machine can connect to them, and
is refused without the token. No port answers without one: metrics are not exported, and `connect` starts the dashboard
only where it is asked to, whose page (not what it shows) comes without a token. Other machines reach nothing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cluster.guard import Guard
from data_prep.errors import UserError

# Left to itself, a local ray.init() writes a token into the home folder and so turns authentication on for
# every later `ray start` there. The token of our own Ray is never written: its processes inherit it.
AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

LOOPBACK = "127.0.0.1"
OWN_ENV = {
    # Ray replaces a loopback address by the machine's own, except where it knows no clusters (macOS, Windows)
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # two servers of metrics that ask for no token have no switch: with this port they do not start, and log that
    "AUTOSCALER_METRIC_PORT": "-1",
    "DASHBOARD_METRIC_PORT": "-1",
}
SLOW_S = 180
"""How long the second try waits for what the first waits 30 s for."""
PREFIX = "dbd-ray-"
LONGEST_SOCKET = 107
"""Characters in the path of a socket (Linux)."""
SOCKET = "/r/session_2000-01-01_00-00-00_000000_0000000/sockets/dash_MetricsHead"
"""The longest path that Ray puts below its folder."""


class StartError(UserError):
    """A Ray of our own could not be started, and not by a mistake of the user."""

    exit_code = 1


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


@contextmanager
def running(**options: Any) -> Iterator[None]:
    """Inside the block a Ray of our own runs, and this process is connected to it.

    Args:
        options: for `ray.init`.

    Raises:
        StartError: it could not be started, also with more time; UserError: there is no place for its sockets.
    """
    import ray
    from ray._private import ray_constants

    with ExitStack() as around:
        folder = around.enter_context(private_folder(os.environ))
        around.enter_context(_environment(token_env(os.environ) | OWN_ENV))
        around.enter_context(_replaced(ray_constants, "ENABLE_RAY_CLUSTER", False))
        # `uv run` would be called again in every worker, and the working folder be packed for it: there is no need here
        around.enter_context(_replaced(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False))
        _reread_environment()
        around.callback(ray.shutdown)
        _start(
            lambda: ray.init(
                address="local",
                dashboard_host=LOOPBACK,
                _node_ip_address=LOOPBACK,
                _temp_dir=str(folder / "r"),  # Ray opens this one to everybody; nobody else comes through the one above
                _system_config={"enable_metrics_collection": False},
                **options,
            )
        )
        around.callback(Guard().stop)  # called before ray.shutdown
        yield


def _start(init: Callable[[], object]) -> None:
    """Call `init`, and where the machine was too slow for Ray's limits once more with longer ones."""
    before = _children()
    try:
        init()
        return
    except Exception as error:  # Ray raises whatever its parts do
        _end(_children() - before)
        if "timed out" not in str(error).lower():
            raise _start_error(error) from error
    print(f"note: Ray did not start in 30 s; once more, with {SLOW_S} s", file=sys.stderr)
    try:
        with _patient():
            init()
    except Exception as error:
        _end(_children() - before)
        raise _start_error(error, "the machine is busy: the same command starts again when it is less so") from error


def _start_error(error: Exception, hint: str = "the same command starts again") -> StartError:
    if "No space left" in str(error):
        hint = "free some space in the folder for temporary files (RAY_TMPDIR or TMPDIR name another), then start again"
    what = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder="...")
    return StartError(f"Ray could not be started ({what})", hint=hint)


@contextmanager
def _patient() -> Iterator[None]:
    """Inside the block Ray waits longer for its processes: its own limit is a number in its code."""
    from ray._private import services

    ask = services.get_node

    def get_node(*arguments: Any) -> Any:
        end = time.monotonic() + SLOW_S
        while True:
            try:
                return ask(*arguments)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    more = {"RAY_gcs_server_port_wait_time_s": str(SLOW_S)}
    with _replaced(services, "get_node", get_node), _environment(more):
        yield


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block an attribute has another value."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside the block these variables are set, and those of the token are as they were afterwards."""
    before = {name: os.environ.get(name) for name in {*values, *AUTH_VARIABLES}}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _children() -> set[int]:
    """The processes that this one has started."""
    with suppress(OSError):  # Linux only; elsewhere nothing is known, and nothing ended
        return {
            int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        }
    return set()


def _end(pids: set[int]) -> None:
    """What is left of a Ray that did not start."""
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            os.waitpid(pid, 0)


@contextmanager
def private_folder(environ: Mapping[str, str]) -> Iterator[Path]:
    """A new folder for Ray's logs and sockets, entered by this user alone and removed after the block; those of
    processes that were killed are removed too.

    Raises:
        UserError: where temporary files go, there is no room for the paths of Ray's sockets, or no right to write.
    """
    parent = _short_parent(environ)
    for stale in parent.glob(f"{PREFIX}*"):
        _remove_stale(stale)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))  # 0700
    except OSError as error:
        raise UserError(
            f"Ray has no folder for its files ({error.strerror})",
            where=parent,
            hint="name another in RAY_TMPDIR or TMPDIR",
        ) from error
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _short_parent(environ: Mapping[str, str]) -> Path:
    """Where temporary files go, or /tmp where the paths of sockets would be too long there."""
    name = next((n for n in ("RAY_TMPDIR", "TMPDIR") if environ.get(n)), "TMPDIR")
    wanted = Path(environ.get(name) or "/tmp")
    limit = LONGEST_SOCKET - len(f"/{PREFIX}01234567{SOCKET}")
    if len(os.fsencode(wanted)) <= limit:
        return wanted
    if name == "TMPDIR" and os.access("/tmp", os.W_OK | os.X_OK):
        return Path("/tmp")
    raise UserError(
        f"{name} has {len(os.fsencode(wanted))} characters, too many for the paths of Ray's sockets",
        where=wanted,
        expected=f"at most {limit}",
        hint="RAY_TMPDIR=/tmp names another folder for Ray alone",
    )


def _remove_stale(folder: Path) -> None:
    """Remove a folder of this user's that no process holds."""
    with suppress(OSError):  # somebody else's, or gone
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
            return
        held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)


def _reread_environment() -> None:
    """Ray keeps the authentication mode and the token that it saw when it was imported."""
    from ray import _raylet  # compiled: the type checker cannot look inside

    loader = getattr(_raylet, "AuthenticationTokenLoader")  # noqa: B009
    getattr(_raylet, "Config").initialize("")  # noqa: B009
    loader.instance().reset_cache()
