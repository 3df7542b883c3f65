"""One message for a run that failed, and not by a mistake of the user.

What Ray raises then is long: tracebacks of its own, guesses at what may have happened, everything twice where two ranks
end. Here it is read for what a person asks: what ended, where, why, and what to do now. Types are recognised by their
names, so that the command can use this without Ray.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from os import PathLike

from data_prep.errors import UserError

LONGEST = 300
"""Characters of a foreign message that are kept."""

COLLATERAL = re.compile(r"connection (closed|reset|refused)|closed by peer|gloo|nccl|timed out|timeout|aborted", re.I)
"""What the other ranks say when one has ended in the middle of an exchange."""
NODE = re.compile(r"Node Id: (\w+)|\bip: ([\w.:]+)|\bip=([\w.:]+)")
PID = re.compile(r"\bpid: (\d+)|\bpid=(\d+)")

NO_MEMORY = "was ended because the memory of its machine ran out"
NO_RESOURCES = "Ray had no resources for"
KILLED = "was killed"
NO_GROUP = "could not form a process group"
HINTS = {
    NO_MEMORY: "free memory, or use fewer --compute.workers or smaller batches; then ",
    NO_RESOURCES: "see what is free with `ray status`, or use fewer --compute.workers; then ",
    KILLED: "SIGKILL ends a process so, often because the system ran out of memory; ",
    NO_GROUP: "name the network interface that the machines share (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and see "
    "`dbd doctor`; then ",
}
ENDS = (
    ("OutOfMemoryError", "", NO_MEMORY),
    ("RayActorError", "low on memory", NO_MEMORY),  # other messages name the OOM killer as one of several guesses
    ("ActorUnavailableError", "", "cannot be reached"),
    ("RayActorError", "node has died", "ended with its machine"),
    ("NodeDiedError", "", "ended with its machine"),
    ("RayActorError", "creation task", "could not start"),
    ("RayActorError", "ray.kill", "was ended through Ray"),
    ("RayActorError", "", KILLED),  # Ray sees a connection close: neither signal nor exit code
)
"""How a process of Ray's ended: the exception's type, words in its text, and how to say it. The first that fits."""


class RunFailed(UserError):
    """A run failed, and not by a mistake of the user; the command prints it as one message and exits with 1."""

    exit_code = 1


def run_failed(
    why: BaseException | str, *, where: str | PathLike[str], resumes_from: str | None = None, tries: int = 1
) -> RunFailed:
    """The message for what ended a run.

    Args:
        why: what `fit()` of Ray Train or Ray itself raised, or a sentence.
        where: the run's folder.
        resumes_from: the last checkpoint in words ("mixmatch, epoch 3"); None where there is none yet.
        tries: how often the workers were started.
    """
    what = why if isinstance(why, str) else describe(why)
    if tries > 1 and not isinstance(why, str) and _is(why, "WorkerGroupError"):
        what = f"{what}; the workers had been started {tries} times"
    start = "starts it again" if resumes_from is None else f"resumes from {resumes_from}"
    first = next((hint for phrase, hint in HINTS.items() if phrase in what), "")
    return RunFailed(what, where=where, hint=f"{first}the same command {start}")


def describe(error: BaseException) -> str:
    """What ended, and why, in one sentence."""
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, Mapping) and failures:
        return of_workers(failures)
    inner = getattr(error, "controller_failure", None)
    if isinstance(inner, BaseException):
        return _of_controller(inner)
    end = _end(error)
    if end is not None:
        return f"Ray Train's controller {end}"
    if _is(error, "RpcError", "RaySystemError", "ObjectLostError", "OwnerDiedError", "LocalRayletDiedError"):
        return f"Ray has failed ({_last_line(error)})"
    return f"the run ended with {_named(error)}"


def of_workers(failures: Mapping[int, BaseException]) -> str:
    """The rank that ended first, as far as the errors show it, and how, in one sentence."""
    errors = {rank: getattr(error, "health_check_failure", error) for rank, error in failures.items()}

    def collateral(error: BaseException) -> int:
        """0 for a process or machine that ended; 2 for what may follow from that."""
        return 0 if _end(error) is not None else 2 if COLLATERAL.search(_last_line(error)) else 1

    rank = min(errors, key=lambda r: (collateral(errors[r]), r))
    more = len(failures) - 1
    others = f" (and {more} other rank{'s' if more > 1 else ''} after it)" if more else ""
    return f"rank {rank}{others} {_end(errors[rank]) or f'ended with {_named(errors[rank])}'}"


def _of_controller(error: BaseException) -> str:
    if _is(error, "WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"):
        return f"{NO_RESOURCES} {getattr(error, 'num_workers', 'the')} workers in time"
    end = _end(error)
    if end is not None:
        return f"a worker that was being started {end}"
    if re.search("init_process_group|_setup_torch_process_group", str(error)):
        return f"the workers {NO_GROUP} ({_last_line(error)})"
    return f"Ray Train's controller ended with {_named(error)}"


def _end(error: BaseException) -> str | None:
    """How a process of Ray's ended, to follow its name; None for exceptions of the program."""
    text = str(error)
    for name, words, phrase in ENDS:
        if _is(error, name) and words in text:
            last = f": {_last_line(error)}" if words == "creation task" else ""
            return f"{phrase}{_place(text)}{last}"
    return None


def _is(error: BaseException, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _named(error: BaseException) -> str:
    """The type of an exception and its last line, which in a traceback already names the type."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        error = cause
    name, line = type(error).__name__, _last_line(error)
    return line if line.partition(":")[0].rpartition(".")[2] == name else f"{name}: {line}"


def _last_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) and str(cause) else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], LONGEST, placeholder="...") if lines else "no message"


def _place(text: str) -> str:
    """Machine and process that a message of Ray's names."""
    found = [("pid", PID.search(text)), ("node", NODE.search(text))]
    parts = [f"{word} {next(filter(None, match.groups()))}" for word, match in found if match]
    return f" ({', '.join(parts)})" if parts else ""
