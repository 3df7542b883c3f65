"""One message for a run that cannot go on for no mistake of its user's.

What Ray raises then is long and says little: tracebacks of its own, hints at what may have happened, everything twice
where two ranks end. Here it is read for what a person asks: what ended, where, why, and what to do now. Types are
recognised by their names, so that the command can use this without Ray.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from os import PathLike

LONGEST = 300
"""Characters of a foreign message that are kept."""

COLLATERAL = re.compile(r"connection (closed|reset|refused)|closed by peer|gloo|nccl|timed out|timeout|aborted", re.I)
"""What the other ranks say when one has gone in the middle of an exchange."""

OUT_OF_MEMORY = re.compile(r"running low on memory|memory pressure|OutOfMemoryError|out of memory", re.I)
ON_NODE = re.compile(r"Node Id: (?P<node>\w+)|\bip: (?P<ip>[\w.:]+)|\bip=(?P<ip2>[\w.:]+)")
PID = re.compile(r"\bpid: (\d+)|\bpid=(\d+)")


class RunFailed(Exception):
    """A run ended that its user did nothing wrong about; the command prints it as one message and exits with code 1.

    Args:
        what: what ended and why, in one sentence.
        where: the run's folder.
        hint: what to do next.
    """

    def __init__(self, what: str, *, where: str | PathLike[str] | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        stop = "" if what.endswith((".", "?", "!")) else "."
        parts = [f"{what}{stop}" if where is None else f"{where}: {what}{stop}"]
        if hint is not None:
            parts.append(f"Hint: {hint}.")
        super().__init__(" ".join(parts))

    def __reduce__(self):  # keyword-only arguments survive the trip from another process
        return (_rebuild, (self.what, self.where, self.hint))


def _rebuild(what: str, where, hint) -> RunFailed:
    return RunFailed(what, where=where, hint=hint)


def run_failed(
    why: BaseException | str,
    *,
    where: str | PathLike[str],
    goes_on_from: str | None = None,
    tries: int = 1,
) -> RunFailed:
    """The message for what ended a run.

    Args:
        why: what `fit()` of Ray Train or Ray itself raised, or a sentence.
        where: the run's folder.
        goes_on_from: the last checkpoint in words ("mixmatch, epoch 3"); None where there is none yet.
        tries: how often the workers were started.
    """
    what = why if isinstance(why, str) else describe(why)
    if tries > 1 and not isinstance(why, str) and _is(why, "WorkerGroupError"):
        what = f"{what.rstrip('.')}; the workers had been started {tries} times"
    start = "starts it again" if goes_on_from is None else f"goes on from {goes_on_from}"
    return RunFailed(what, where=where, hint=f"{_remedy(what)}the same command {start}")


def _remedy(what: str) -> str:
    if "memory of its machine ran out" in what:
        return "free memory, or use fewer --compute.workers or smaller batches; then "
    if "resources" in what:
        return "see what is free with `ray status`, or use fewer --compute.workers; then "
    if "process group" in what:
        return (
            "name the network interface that the machines share (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and see "
            "`dbd doctor`; then "
        )
    return ""


def describe(error: BaseException) -> str:
    """What ended, and why, in one sentence."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, Mapping) and failures:
        return _of_workers(failures)
    inner = getattr(error, "controller_failure", None)
    if isinstance(inner, BaseException):
        return _of_controller(inner)
    if _is(error, "RayActorError"):
        return f"Ray Train's controller {_of_actor(error)}"
    if _is(error, "LocalRayletDiedError"):
        return "the raylet of this machine has ended"
    if _is(error, "PreemptionError"):
        return "the machines of some workers were taken away (preempted)"
    if _is(error, "RpcError", "RaySystemError", "ObjectLostError", "OwnerDiedError"):
        return f"Ray has failed ({_last_line(error)})"
    return f"the run ended with {_named(error)}"


def _of_workers(failures: Mapping[int, BaseException]) -> str:
    """The rank that the others only followed, and what it ended with."""
    rank = min(failures, key=lambda r: (_blame(failures[r]), r))
    more = len(failures) - 1
    after = "" if not more else f" (and {more} other rank{'s' if more > 1 else ''} after it)"
    error = failures[rank]
    inner = getattr(error, "health_check_failure", error)
    if _is(inner, "RayActorError"):
        return f"rank {rank}{after} {_of_actor(inner)}"
    if _is(inner, "NodeDiedError"):
        return f"rank {rank}{after} ended with its machine{_place(str(inner))}"
    if _is(inner, "OutOfMemoryError") or (_is(inner, "RayError") and OUT_OF_MEMORY.search(str(inner))):
        return f"rank {rank}{after} was ended because the memory of its machine ran out{_place(str(inner))}"
    if _is(error, "WorkerHealthCheckTimeoutError"):
        return f"rank {rank}{after} did not answer any more"
    return f"rank {rank}{after} ended with {_named(inner)}"


def _blame(error: BaseException) -> int:
    """0 for what surely came first: a process or its machine that ended. 2 for what may follow from that."""
    inner = getattr(error, "health_check_failure", error)
    if _is(inner, "RayActorError", "NodeDiedError", "OutOfMemoryError", "WorkerCrashedError"):
        return 0
    return 2 if COLLATERAL.search(_last_line(inner)) else 1


def _of_actor(error: BaseException) -> str:
    """What ended an actor, to follow its name."""
    text = str(error)
    place = _place(text)
    if OUT_OF_MEMORY.search(text.replace("OOM killer due to high memory usage", "")) and "low on memory" in text:
        return f"was ended because the memory of its machine ran out{place}"
    if _is(error, "ActorUnavailableError"):
        return f"cannot be reached{place}"
    if "node has died" in text:
        return f"ended with its machine{place}"
    if "creation task" in text:
        return f"could not start{place}: {_last_line(error)}"
    if "ray.kill" in text:
        return f"was ended through Ray{place}"
    # Ray sees a connection close, and no more: neither signal nor exit code
    return f"was killed{place}: its process ended without a word, as with SIGKILL or when the system runs out of memory"


def _of_controller(error: BaseException) -> str:
    if _is(error, "WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
        workers = getattr(error, "num_workers", None)
        return f"Ray had no resources for {'the' if workers is None else workers} workers in time"
    if _is(error, "WorkerGroupStartupFailedError"):
        return f"the workers could not be started ({_last_line(error)})"
    if _is(error, "RayActorError"):
        return f"a worker that was being started {_of_actor(error)}"
    text = str(error)
    if "init_process_group" in text or "_setup_torch_process_group" in text:
        return f"the workers could not form a process group ({_last_line(error)})"
    if _is(error, "CheckpointManagerInitializationError"):
        return f"Ray Train cannot read its own folder ({_last_line(error)})"
    return f"Ray Train's controller ended with {_named(error)}"


def _is(error: BaseException, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _named(error: BaseException) -> str:
    """The type of an exception and its last line, which that of a traceback already names."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    name, line = type(error).__name__, _last_line(error)
    return line if line.partition(":")[0].rpartition(".")[2] == name else f"{name}: {line}"


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) and str(cause) else error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], LONGEST, placeholder="...") if lines else "no message"


def _place(text: str) -> str:
    """Machine and process that a message of Ray's names."""
    pid, node = PID.search(text), ON_NODE.search(text)
    parts = [f"pid {next(filter(None, pid.groups()))}"] if pid else []
    if node:
        parts.append(f"node {next(filter(None, node.groups()))}")
    return f" ({', '.join(parts)})" if parts else ""
