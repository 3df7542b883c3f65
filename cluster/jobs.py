"""Jobs on a running cluster, through its dashboard: submitted, followed, ended with the exit code of what they ran."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError

PROBE_S = 8.0
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXCLUDES = (".git", "tests", "docs", "runs", "datasets", ".venv")
"""Besides what .gitignore lists."""
DETACHED = 130
"""Exit code after Ctrl-C, which the job survives."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run, and with what."""

    command: Sequence[str]
    working_dir: Path | None = None
    """Packed and sent to the cluster; None: nothing is."""
    pip: Sequence[str] = ()
    """Requirements to install for it there."""
    env: Mapping[str, str] | None = None
    num_cpus: float | None = None
    """For the command itself; its workers ask for their own."""
    memory_gib: float | None = None

    @property
    def runtime_env(self) -> dict[str, Any]:
        found: dict[str, Any] = {"env_vars": {"RAY_USAGE_STATS_ENABLED": "0", **(self.env or {})}}
        if self.working_dir is not None:
            found |= {"working_dir": str(self.working_dir), "excludes": list(EXCLUDES)}
        if self.pip:
            found["pip"] = list(self.pip)
        return found


def address_from(given: str | None, environ: Mapping[str, str]) -> str:
    """The dashboard's address: as given, or as the environment says it.

    Raises:
        UserError: it is none, or Ray's own port.
    """
    named = given or environ.get("RAY_API_SERVER_ADDRESS") or ""
    if not named and environ.get("RAY_ADDRESS", "").startswith("http"):
        named = environ["RAY_ADDRESS"]
    address = (named or DEFAULT_ADDRESS).strip().rstrip("/")
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("http", "https") or not rest:
        raise UserError(
            f"{address!r} is no address of a dashboard",
            where="--address",
            expected="http://HOST:8265",
            hint="jobs go through the dashboard's port, not through that of Ray's head (6379)",
        )
    return address


def token_env(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Variables that show a token where there is one: Ray does so only when it is told to."""
    if "RAY_AUTH_MODE" in environ:
        return {}
    there = environ.get("RAY_AUTH_TOKEN") or environ.get("RAY_AUTH_TOKEN_PATH") or (home / ".ray/auth_token").is_file()
    return {"RAY_AUTH_MODE": "token"} if there else {}


def _token(environ: Mapping[str, str]) -> str | None:
    if environ.get("RAY_AUTH_MODE") != "token":
        return None
    if environ.get("RAY_AUTH_TOKEN"):
        return environ["RAY_AUTH_TOKEN"]
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    try:
        return path.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            "the token cannot be read", where=path, hint="`ray get-auth-token --generate` makes one"
        ) from error


def check(address: str, environ: Mapping[str, str]) -> None:
    """Whether a dashboard of Ray's answers there, and takes our token; in some seconds, with nothing started.

    Raises:
        UserError
    """
    token = _token(environ)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = "check the address, and that its port is reachable (`ray dashboard`, or ssh -L 8265:127.0.0.1:8265 HEAD)"
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=PROBE_S) as answer:
            json.loads(answer.read(1 << 16))["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            what = "the cluster wants a token" if token is None else "the cluster does not take this token"
            raise UserError(
                what,
                where=address,
                hint="RAY_AUTH_TOKEN_PATH names the file that holds the cluster's own, ~/.ray/auth_token unless set",
            ) from error
        raise UserError(f"no dashboard of Ray's (HTTP {error.code})", where=address, hint=hint) from error
    except (OSError, ValueError) as error:  # refused, unknown host, no HTTP, not in time
        reason = getattr(error, "reason", error)
        raise UserError(f"no dashboard answers ({reason})", where=address, hint=hint) from error
    except (KeyError, TypeError) as error:
        raise UserError("no dashboard of Ray's", where=address, hint=hint) from error


def submit(address: str, job: Job, *, follow: bool = True) -> int:
    """Submit a job, and show its log until it ends.

    Returns:
        The exit code of the job's command; 0 at once without `follow`.

    Raises:
        UserError: the cluster refuses it.
    """
    client = _client(address)
    try:
        job_id = client.submit_job(
            entrypoint=shlex.join(job.command),
            runtime_env=job.runtime_env,
            entrypoint_num_cpus=job.num_cpus,
            entrypoint_memory=None if job.memory_gib is None else int(job.memory_gib * 2**30),
        )
    except (RuntimeError, ValueError, ConnectionError) as error:
        raise UserError(f"the cluster refuses the job ({_first_line(error)})", where=address) from error
    print(f"job {job_id}", file=sys.stderr, flush=True)
    if not follow:
        print(_ways_back(address, job_id), file=sys.stderr)
        return 0
    return follow_job(address, job_id, client=client)


def follow_job(address: str, job_id: str, *, client: Any = None) -> int:
    """Show a job's log until it ends; Ctrl-C leaves the job alone.

    Returns:
        The exit code of the job's command, or DETACHED.

    Raises:
        UserError: there is no such job.
    """
    client = client or _client(address)
    try:
        client.get_job_info(job_id)
    except RuntimeError as error:
        raise UserError(f"there is no job {job_id!r}", where=address, hint="`ray job list` names them") from error

    async def show() -> None:
        async for lines in client.tail_job_logs(job_id):
            print(lines, end="", flush=True)

    try:
        asyncio.run(show())
    except KeyboardInterrupt:
        print(f"\ndetached; the job goes on. {_ways_back(address, job_id)}", file=sys.stderr)
        return DETACHED
    info = client.get_job_info(job_id)
    status = str(getattr(info.status, "value", info.status))
    code = info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if code is None or code == 0:
        print(f"job {job_id}: {status.lower()}: {info.message or 'without a word'}", file=sys.stderr)
    return code or 1


def _ways_back(address: str, job_id: str) -> str:
    return (
        f"Its log: dbd submit --address {address} --follow {job_id}; to stop it: "
        f"ray job stop --address {address} {job_id}"
    )


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    before = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}  # it prefers them
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"no dashboard answers ({_first_line(error)})", where=address) from error
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
