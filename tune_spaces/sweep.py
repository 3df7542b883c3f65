"""A sweep on Ray Tune: trials proposed, run, watched, stopped, written down."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster import session, topology
from cluster.calls import Call
from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io import lock
from data_prep.io.atomic import write_text
from dbd_dist.launch.failures import RunFailed
from dbd_dist.runtime import stopping
from dbd_dist.runtime.stopping import Stopped
from tune_spaces import plan as plans
from tune_spaces import search as searches
from tune_spaces.attack_settings import of_attack
from tune_spaces.book import Book, Row
from tune_spaces.plan import Plan
from tune_spaces.show import Show
from tune_spaces.trial import STOP_FILE, early, left_by, ranked_row, rows_of, run_names

NESTED_CPU = 0.01
"""Of a trial that starts workers and waits for them; Ray refuses 0."""
RETRIES = 2
"""Times that a trial is tried again after its process has ended."""
GRACE_S = 8.0
"""How long trials may take to stop before Ray is ended under them."""
POLL_S = 0.3
ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is not read: sweep.json and the run folders are
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """What each trial asks Ray for, and how many run at a time."""

    parallel: int
    cpus: float
    """Of a worker."""
    gpus: float | None
    threads: int

    def resources(self, workers: int) -> dict[str, float]:
        """Of the process that Tune starts for a trial."""
        if workers > 1:
            return {"CPU": NESTED_CPU}
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def size_of(plan: Plan, machines: topology.Topology) -> Size:
    """How a sweep shares the machines among its trials.

    Raises:
        UserError: they do not hold one trial.
    """
    asked: dict[str, Any] = {"workers": plan.workers}
    asked["use_gpu"] = False if plan.base.compute.device == "cpu" and not plan.gpus_per_worker else None
    if plan.gpus_per_worker:
        asked |= {"use_gpu": True} | ({} if plan.gpus_per_worker == 1 else {"gpus_per_worker": plan.gpus_per_worker})
    one = topology.worker_resources(machines, **asked)
    fits = 1
    for count in range(2, max(2, machines.cpus) + 1):
        with suppress(UserError):
            topology.worker_resources(machines, **asked, runs=count)
            fits = count
    parallel = max(1, min(plan.parallel or fits, fits, plan.trials))
    each = topology.worker_resources(machines, **asked, runs=parallel).cpus_per_worker
    cpus = each * 0.9 if plan.workers > 1 else each  # leaves room for NESTED_CPU
    gpus = (plan.gpus_per_worker or 1.0) if one.use_gpu else None
    return Size(parallel=parallel, cpus=cpus, gpus=gpus, threads=int(each))


def run_sweep(plan: Plan) -> Book:
    """Run what is left of a sweep.

    Raises:
        UserError: something in it cannot be; the folder holds another sweep; another process is at work on it.
        Stopped: on request.
        RunFailed: Ray has ended.
    """
    dataset = open_dataset(next(iter(plan.datas.values())))
    plans.check(plan, dataset)
    if session.cluster_address(os.environ) is None:
        size_of(plan, topology.this_machine())
    identity = plan.identity(dataset.manifest.data_hash)
    Book(plan.folder, identity, plan.metrics)  # refuses another sweep before the folder is locked
    with lock.held(plan.folder / lock.FILE, str(plan.folder)):
        book = Book(plan.folder, identity, plan.metrics)
        (plan.folder / STOP_FILE).unlink(missing_ok=True)
        left = [number for number in range(plan.trials) if not book.ended(number)]
        show = Show(plan, book)
        if left or _untried(plan, book):
            _run(plan, book, show)
        else:
            show.say("every trial is finished")
    return book


def job_of(plan: Plan, size: Size) -> dict[str, Any]:
    """What every trial's process needs to know, as plain values."""
    nested = plan.workers > 1 and plan.gpus_per_worker
    share: dict[str, Any] = (
        {"gpus_per_worker": plan.gpus_per_worker} if nested else {}
    )  # else Tune's own resources say it
    compute = dataclasses.replace(
        plan.base.compute, workers=plan.workers, threads=size.threads, defender_metrics=not plan.attacks, **share
    )
    return {
        "base": dataclasses.replace(plan.base, compute=compute).to_dict(),
        "attack": of_attack(plan.fixed),
        "preset": plan.base.preset,
        "method": plan.base.method.name,
        "datas": {str(seed): str(folder) for seed, folder in plan.datas.items()},
        "storage": str(plan.storage),
        "name": plan.name,
        "cpus": size.cpus,
        "asha": plan.asha is not None,
        "metric": dataclasses.asdict(plan.metrics[0]),
        "attacks": plan.attacks,
        "min_psnr": plan.min_psnr,
        "min_ssim": plan.min_ssim,
        "command": list(sys.argv),
    }


def _run(plan: Plan, book: Book, show: Show) -> None:
    os.environ.update({k: v for k, v in ENV.items() if k not in os.environ})
    with session.connect(dashboard=plan.workers > 1):  # Tune frees what stopped Train trials held through it
        size = size_of(plan, topology.from_ray())
        show.start(size.parallel)
        keeper = Keeper(plan, book, show)
        with keeper.stopping():
            keeper.fit(size)
            if keeper.why is None and _untried(plan, book):
                _try_against(plan, size, keeper)
    if keeper.why in stopping.EXIT_CODES:
        raise Stopped(
            f"stopped after {sum(map(book.ended, book.rows))} of {plan.trials} trials ({keeper.why})",
            where=plan.folder, hint="the same command resumes from there", exit_code=stopping.EXIT_CODES[keeper.why],
        )  # fmt: skip
    if keeper.why == "budget":
        show.say("the time budget is used up; the same command with a larger one continues")


def _untried(plan: Plan, book: Book) -> Row | None:
    """The best attack, if it has not met the methods in `plan.against`."""
    best = book.best()
    if not plan.against or best is None or "too_visible_by" in best["metrics"] or "against" in best:
        return None
    return best


def _try_against(plan: Plan, size: Size, keeper: Keeper) -> None:
    """Train the methods in `plan.against` under the best attack."""
    import ray

    from tune_spaces.attack import against

    best = _untried(plan, keeper.book)
    assert best is not None
    keeper.show.say(f"the attack of trial {best['number']} against {', '.join(plan.against)}")
    run = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus or 0)(against)
    job = job_of(plan, size)
    every = left = [run.remote(method, best["values"], best["number"], job) for method in plan.against]
    while left:
        _, left = ray.wait(left, num_returns=len(left), timeout=1)
        if keeper.why is not None:
            return
    keeper.book.end(best["number"], against={one["method"]: one["metrics"] for one in ray.get(every)})


class Keeper:
    """Stands between Tune and the book."""

    def __init__(self, plan: Plan, book: Book, show: Show):
        self._plan, self.book, self.show = plan, book, show
        self._search = searches.make(plan)
        self._scheduler = self._make_scheduler()
        self._next = 0
        self._running: dict[str, int] = {}
        self._lock = threading.RLock()
        self.why: str | None = None
        """Why the sweep is to stop: the name of a signal, or "budget"."""
        self._end = None if plan.time_budget_s is None else time.monotonic() + plan.time_budget_s
        self._recall()

    # -- what earlier commands did

    def _recall(self) -> None:
        """Tell the search and the scheduler of the trials that are there."""
        for number, row in sorted(self.book.rows.items()):
            if self.book.ended(number):
                self._tell(row)
                self._remind(row)
            else:
                self._search.begun(number, row["values"])

    def _tell(self, row: Row) -> None:
        stopped = row["epoch"] if row["status"] == "stopped" else None
        self._search.ended(row["number"], row["values"], self.book.signed(row), early=stopped)

    def _remind(self, row: Row) -> None:
        """Lead an ended trial past the scheduler's rungs once more."""
        if self._scheduler is None:
            return
        past: Any = SimpleNamespace(trial_id=f"past-{row['number']}")
        self._scheduler.on_trial_add(None, past)  # type: ignore[arg-type]
        for line in rows_of(Path(row["runs"][0])):
            told = ranked_row(line, self._plan.metrics[0])
            if told is not None:
                self._scheduler.on_trial_result(None, past, told)  # type: ignore[arg-type]

    def _make_scheduler(self) -> Any:
        from ray.tune.schedulers import ASHAScheduler

        asha = self._plan.asha
        if asha is None:
            return None
        return ASHAScheduler(
            time_attr="epoch", metric="value", mode="max", grace_period=asha.grace, reduction_factor=asha.reduction,
            max_t=1_000_000,
        )  # fmt: skip

    # -- what Tune asks for

    def propose(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial; None where there is none left."""
        with self._lock:
            while self._next < self._plan.trials and self.book.ended(self._next):
                self._next += 1
            number = self._next
            if number >= self._plan.trials or self.why is not None:
                return None
            row = self.book.rows.get(number)
            if row is not None:
                values = row["values"]
            elif number == 0 and self._plan.first is not None:
                values = dict(self._plan.first)
                self._search.begun(number, values)
            else:
                values = self._search.propose(number)
            if values is None:
                return None
            self.book.begin(number, values)
            self._running[trial_id] = number
            self._next += 1
            return {"number": number, "values": json.dumps(values)}

    def completed(self, trial_id: str, result: dict[str, Any] | None) -> None:
        """A trial has ended by itself, or the scheduler has stopped it."""
        with self._lock:
            number = self._running.pop(trial_id)
            outcome = json.loads((result or {}).get("outcome") or "{}")
            if outcome.get("status") == "interrupted" or (not outcome and self.why is not None):
                return  # resumed by the next command
            if not outcome:
                folders = self._folders(number)
                epoch, metrics = early(folders, self._plan.metrics[0])
                (folders[0] / "progress.json").unlink(missing_ok=True)
                outcome = {"status": "stopped", "epoch": epoch, "metrics": metrics, **left_by(folders)}
            row = self.book.end(number, **outcome)
            self._tell(row)
            self.show.ended(row)

    def errored(self, trial_id: str, message: str) -> None:
        """A trial's process has ended every time."""
        with self._lock:
            number = self._running.pop(trial_id)
            if self.why is not None:
                return
            row = self.book.end(number, status="failed", message=message)
            self._tell(row)
            self.show.ended(row)

    def wants_stop(self) -> bool:
        """Whether Tune is to end everything."""
        if self._end is not None and time.monotonic() > self._end and self.why is None:
            self.request("budget")
        return self.why is not None

    def _folders(self, number: int) -> list[Path]:
        return [
            self._plan.storage / name for name in run_names(self._plan.name, number, list(self._plan.seeds)).values()
        ]

    # -- stopping

    def request(self, why: str) -> None:
        """Stop: no further trial, and a checkpoint of those that run."""
        self.why = self.why or why
        self._forward()

    def _forward(self) -> None:
        """Pass the request on to the runs; again and again, since one may just be starting."""
        reason = self.why if self.why in stopping.EXIT_CODES else "SIGTERM"
        with suppress(OSError):
            write_text(self._plan.folder / STOP_FILE, reason)
        for number in list(self._running.values()):
            for folder in self._folders(number):
                for place in (folder, *(p.parent for p in folder.glob("*/run.json"))):
                    if (place / "run.json").exists():
                        with suppress(OSError):
                            write_text(place / stopping.FILE, reason)

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Inside, Ctrl-C and SIGTERM are requests to stop."""
        try:
            with stopping.signals(self.request):
                yield
        finally:
            with suppress(OSError):
                (self._plan.folder / STOP_FILE).unlink(missing_ok=True)

    # -- Tune

    def fit(self, size: Size) -> None:
        """Run trials until none is left or somebody wants to stop."""
        call, watch = Call(_tuner(self, self._plan, size, self._scheduler).fit), session.Watch()
        asked: float | None = None
        while call.runs(POLL_S):
            lost = watch.lost()
            if lost is not None and call.runs():
                raise RunFailed(lost, where=self._plan.folder, hint="the same command resumes")
            self.show.watch(list(self._running.values()))
            if self.why is not None:
                asked = asked or time.monotonic()
                self._forward()
                if time.monotonic() - asked > GRACE_S:
                    return  # what still runs ends with Ray, and resumes from its last checkpoint
        if call.error is not None and self.why is None:
            last = (str(call.error).strip().splitlines() or [type(call.error).__name__])[-1]
            raise RunFailed(f"Ray Tune has ended ({last})", where=self._plan.folder, hint="the same command resumes")


def _tuner(keeper: Keeper, plan: Plan, size: Size, scheduler: Any) -> Any:
    from ray import tune

    from tune_spaces.tuning import Caller, Proposer, Stop
    from tune_spaces.worker import trial

    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_resources(tune.with_parameters(trial, job=job_of(plan, size)), size.resources(plan.workers))
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=Proposer(keeper), scheduler=scheduler, num_samples=-1, max_concurrent_trials=size.parallel,
            reuse_actors=plan.workers == 1,
        ),
        run_config=tune.RunConfig(
            name=f"ray-{time.time_ns()}", storage_path=str(plan.folder / "tune"), verbose=0, stop=Stop(keeper),
            callbacks=[Caller(keeper)], failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )  # fmt: skip
