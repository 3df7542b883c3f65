"""What a run on a busy cluster waits for, said while it waits."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

from data_prep.errors import UserError

FIRST_S, EVERY_S = 5.0, 60.0
"""When it is said, and how often again."""
STATE_API_S = 3
"""How long the dashboard may take to say who holds what."""

Resources = Mapping[str, float]


class StillWaiting(UserError):
    """The cluster stayed busy for longer than its user wants to wait."""

    exit_code = 1


class Waiting:
    """Polled while workers run or are to; says what they wait for where the cluster has too little free.

    Args:
        count: workers, each of which needs `each` on one node.
        started: whether the workers run. They may be lost, and wait anew.
        limit_s: how long to wait each time; None: for ever.
        quiet: says nothing.
    """

    def __init__(
        self,
        count: int,
        each: Resources,
        started: Callable[[], bool],
        *,
        limit_s: float | None = None,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._count, self._each, self._started = count, each, started
        self._limit_s, self._stream, self._clock = limit_s, stream or sys.stderr, clock
        self._first = FIRST_S if not quiet else float("inf")
        self._since: float | None = clock()
        self._next = self._first

    def poll(self) -> bool:
        """Whether the workers do not run, for the first time or any more.

        Raises:
            StillWaiting: for longer than the limit.
        """
        if self._started():
            self._since = None
            return False
        if self._since is None:
            self._since, self._next = self._clock(), self._first
        waited = self._clock() - self._since
        if self._limit_s is not None and waited >= self._limit_s:
            raise StillWaiting(
                f"no workers after {waited:.0f} s of waiting for {self.needs}",
                where="--compute.wait-s",
                hint="see what is free with `ray status`; the same command waits again",
            )
        if waited >= self._next:
            self._next = waited + EVERY_S
            free = free_by_node()
            if fitting(free, self._each) < self._count:
                print(self.message(free, total_by_node(), holders()), file=self._stream, flush=True)
        return True

    @property
    def needs(self) -> str:
        return " and ".join(_count(name, amount * self._count) for name, amount in self._each.items())

    def message(self, free: Sequence[Resources], total: Sequence[Resources], held_by: Sequence[str]) -> str:
        """Such as "waiting for 2 CPUs; the cluster has 2, 0 free (held by 2 Counter of job 02000000)"."""
        parts = []
        for name in self._each:
            all_of, left = (sum(node.get(name, 0.0) for node in nodes) for nodes in (total, free))
            kind = "" if len(self._each) == 1 else f" {name}s"
            parts.append(f"{all_of:g}{kind}, {left:g} free")
        held = f" (held by {', '.join(held_by)})" if held_by else ""
        spread = ""
        if all(sum(node.get(n, 0.0) for node in free) >= a * self._count for n, a in self._each.items()):
            spread = f"; no node has room for {' and '.join(_count(n, a) for n, a in self._each.items())} of one worker"
        return f"waiting for {self.needs}; the cluster has {'; '.join(parts)}{held}{spread}"


def fitting(free: Sequence[Resources], each: Resources) -> int:
    """How many workers fit on the nodes, none of which shares one with another node."""
    needed = {name: amount for name, amount in each.items() if amount > 0}
    return sum(min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needed.items()) for node in free)


def free_by_node() -> list[Resources]:
    """What is free on each living node of the connected Ray."""
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())


def total_by_node() -> list[Resources]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def holders() -> list[str]:
    """Who holds CPUs or GPUs: actors and running tasks by class and job; [] where Ray's dashboard does not tell."""
    found: Counter[tuple[str, str]] = Counter()
    with suppress(Exception):  # whatever the State API raises: there need not be a dashboard
        from ray.util.state import list_actors, list_tasks

        rows: Any
        alive, running = ("state", "=", "ALIVE"), ("state", "=", "RUNNING")
        rows = list_actors(filters=[alive], detail=True, timeout=STATE_API_S, raise_on_missing_output=False)
        for actor in rows:
            if _holds(actor.required_resources):
                found[(actor.class_name, actor.job_id)] += 1
        rows = list_tasks(filters=[running], detail=True, timeout=STATE_API_S, raise_on_missing_output=False)
        for task in rows:
            if task.type == "NORMAL_TASK" and _holds(task.required_resources):
                found[(task.name, task.job_id)] += 1
    return [f"{count} {name} of job {job}" for (name, job), count in found.most_common()]


def _holds(resources: Resources | None) -> bool:
    return any(name.startswith(("CPU", "GPU")) and amount > 0 for name, amount in (resources or {}).items())


def _count(name: str, amount: float) -> str:
    return f"{amount:g} {name}{'' if amount == 1 else 's'}"
