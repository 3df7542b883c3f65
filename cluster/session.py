"""Connecting to Ray: to the cluster that this process belongs to, or to one of its own on this machine.

A cluster is found by RAY_ADDRESS (set inside a submitted job) or by the note that `ray start` leaves on its
host. Connecting says nothing of CPUs or addresses: Ray refuses both there. Otherwise a Ray of our own is
started, on the loopback address and guarded by a token. It ends with this process, even where this process is
killed (see reaper.py).

A process that is connected to Ray is ended by it, from C++ and without a word that a person could use, some seconds
after Ray has ended; `lost` says so earlier.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.errors import UserError

from . import reaper

# Left to itself, a local ray.init() writes a token into the home folder and so turns authentication on for
# every later `ray start` there. The token of our own Ray lives in a private folder, and goes with it.
AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

HEAD_MAY_BE_AWAY_S = 45.0
"""How long the head of a cluster may not answer: it may be restarted (KubeRay does), and after 60 s Ray ends us."""
REAPER_WAIT_S = 10.0


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
        raise UserError(f"The mode {mode!r} is not known", where="RAY_AUTH_MODE", expected="token, disabled")
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
    private = guard = None
    shown = _show_messages(worker_logs)
    try:
        if address is not None:
            try:
                ray.init(**quiet)
            except (
                ConnectionError,
                RaySystemError,
                AuthenticationError,
            ) as error:
                raise UserError(
                    f"Ray cannot be reached ({textwrap.shorten(str(error), 160, placeholder='...')})",
                    where=address,
                    hint="check that it runs and that RAY_AUTH_MODE and the token are its own; "
                    "RAY_ADDRESS=local starts a Ray here instead",
                ) from error
        else:
            private = Path(tempfile.mkdtemp(prefix="dbd-ray-"))  # mode 700
            guard = _guard(private)
            _write_token(private / "token")
            os.environ.update(token_env(os.environ, private / "token"))
            _reread_environment()
            with _start_watched(private):
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=dashboard,
                    dashboard_host="127.0.0.1",
                    **quiet,
                )
            if guard is not None:
                _tell(guard, [process.pid for _, process in _own_processes()])
        yield address is not None
    finally:
        ray.shutdown()
        _show_messages(shown)
        if guard is not None:
            _end(guard)
        if private is not None:
            shutil.rmtree(private, ignore_errors=True)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class StartError(UserError):
    """A Ray of our own could not be started, for no mistake of its user's."""

    exit_code = 1

    @classmethod
    def because(cls, what: str) -> StartError:
        return cls(
            f"Ray could not be started ({textwrap.shorten(what, 200, placeholder='...')})",
            hint="the same command starts again",
        )


@contextmanager
def _start_watched(folder: Path) -> Iterator[None]:
    """Around the start of a Ray of our own: one message where it fails, also where one of its servers is killed
    meanwhile. Ray then waits for it for a minute, or ends this process at once without a word of ours: the guard of
    `folder` says it.

    Raises:
        StartError
    """
    started = threading.Event()
    said = folder / reaper.STDERR_FILE
    sys.stderr.flush()
    shown = os.dup(2)
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 2)

    def watch() -> None:
        while not started.wait(0.5):
            for name, process in _own_processes():
                code = process.poll()
                if code is not None and not started.wait(5):  # time for Ray to raise an error of its own
                    said.unlink(missing_ok=True)  # so that the guard does not tell it too
                    os.write(shown, f"error: {StartError.because(f'{name} {how_it_ended(code)}')}\n".encode())
                    os._exit(StartError.exit_code)  # the main thread cannot be woken; the reaper clears up

    threading.Thread(target=watch, name="start of Ray", daemon=True).start()
    try:
        yield
    except Exception as error:  # Ray raises whatever its parts do
        raise StartError.because(f"{type(error).__name__}: {error}") from error
    finally:
        started.set()
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)
        with suppress(OSError):  # nobody reads it
            os.write(2, said.read_bytes())
        said.unlink()


class Watch:
    """Tells whether the Ray that this process is connected to is still there. For any thread, one at a time.

    Ask it every second or so while Ray is waited for: asking is what tells Ray's workers too (they live on as long as
    their raylet, which, killed, stays a zombie until its parent looks).
    """

    def __init__(self) -> None:
        from ray._private import worker

        node = getattr(worker, "_global_node", None)  # of a Ray client, there is none
        self._own = _own_processes()
        self._head = None if node is None or self._own else node.gcs_address
        self._raylet = None if node is None or self._own else node.raylet_socket_name
        self._answered = time.monotonic()

    def lost(self) -> str | None:
        """What has ended, in words, if Ray cannot go on; else None."""
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
    """The note outlives a cluster that was killed: `ray stop` alone removes it."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2):
            return True
    except (OSError, ValueError):
        return False


def _listens(path: str) -> bool:
    """Does someone listen on a socket of this machine?"""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        try:
            client.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # full for the moment: someone has it open
            return True
    return True


def _guard(folder: Path) -> subprocess.Popen | None:
    """Start the process that cleans up after this one; None where there is no /proc to do it with."""
    if not Path("/proc/self/stat").exists():
        return None
    return subprocess.Popen(
        [sys.executable, "-I", "-S", reaper.__file__, str(folder), f"error: {StartError.because(reaper.WHAT)}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends this process and its group must not end it
        cwd="/",
    )


def _tell(guard: subprocess.Popen, pids: list[int]) -> None:
    assert guard.stdin is not None
    try:
        guard.stdin.write("".join(f"{pid}\n" for pid in pids).encode())
        guard.stdin.flush()
    except BrokenPipeError:  # someone ended it; Ray's own ways remain
        pass


def _end(guard: subprocess.Popen) -> None:
    """Let it clean up, and wait for it."""
    assert guard.stdin is not None
    try:
        guard.stdin.close()
        guard.wait(REAPER_WAIT_S)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        pass


def _show_messages(wanted: bool) -> bool:
    """Let Ray print here what happens to its processes, twenty lines of its log with each, or not; returns whether it
    did before."""
    from ray._private import worker

    before = worker._worker_logs_enabled
    worker._worker_logs_enabled = wanted
    return before


def _write_token(path: Path) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(secrets.token_hex(32))


def _reread_environment() -> None:
    """Ray keeps the authentication mode and the token that it saw when it was imported."""
    from ray import _raylet  # compiled: the type checker cannot look inside

    loader = getattr(_raylet, "AuthenticationTokenLoader")  # noqa: B009
    getattr(_raylet, "Config").initialize("")  # noqa: B009
    loader.instance().reset_cache()
