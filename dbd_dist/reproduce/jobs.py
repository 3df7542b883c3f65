"""Running commands, several at a time, each after what it needs.

One at a time they run in this process. Several run in processes of their own, forked from one that has imported torch,
which spares each the seconds of that. They end with this process, however it ends: the same table can be made again at
once, and nobody holds its runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from dbd_dist.cli import main
from dbd_dist.reproduce.grid import Task
from dbd_dist.runtime.stopping import EXIT_CODES, Stopped

SKIPPED = -1
"""In the place of an exit code: something that the task needs had failed."""
POLL_S = 0.5


def run_tasks(
    tasks: Sequence[Task], *, jobs: int, report: Callable[[Task, int], None] = lambda task, code: None
) -> dict[str, int]:
    """Run every task, and go on with others where one fails.

    Args:
        tasks: each after those that it needs.
        jobs: how many at a time.
        report: called at the end of each.

    Returns:
        Exit codes by name; SKIPPED where a task that it needed failed.

    Raises:
        Stopped: by SIGINT or SIGTERM, which the runs were passed and left checkpoints for.
    """
    codes: dict[str, int] = {}
    listed = {task.name for task in tasks}
    if jobs == 1:
        for task in tasks:
            codes[task.name] = SKIPPED if _hopeless(task, codes) else _here(task)
            report(task, codes[task.name])
            if codes[task.name] in EXIT_CODES.values():
                raise _stopped(codes[task.name])
        return codes
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dbd_dist.commands.train"])
    waiting, running = list(tasks), {}
    with _signals() as asked:
        try:
            while waiting or running:
                _start(context, waiting, running, codes, listed, 0 if asked else jobs, report)
                if not running:
                    if asked:
                        break
                    continue
                connection.wait([process.sentinel for process in running.values()], timeout=POLL_S)
                for task in [task for task, process in running.items() if process.exitcode is not None]:
                    codes[task.name] = running.pop(task).exitcode or 0
                    report(task, codes[task.name])
                if asked and running:
                    _forward(asked, running)
        finally:
            for process in running.values():  # an error of our own
                process.kill()
    if asked:
        raise _stopped(EXIT_CODES[signal.Signals(asked[0]).name])
    return codes


def _hopeless(task: Task, codes: Mapping[str, int]) -> bool:
    return any(codes.get(name, 0) != 0 for name in task.needs)


def _start(
    context: ForkServerContext,
    waiting: list[Task],
    running: dict[Task, BaseProcess],
    codes: dict[str, int],
    listed: set[str],
    jobs: int,
    report: Callable[[Task, int], None],
) -> None:
    """Start the first tasks that have what they need, as many as there is room for; drop those that never will."""
    for task in list(waiting):
        if _hopeless(task, codes):
            waiting.remove(task)
            codes[task.name] = SKIPPED
            report(task, SKIPPED)
        elif len(running) < jobs and all(n in codes for n in (*task.needs, *task.after) if n in listed):
            waiting.remove(task)
            process = context.Process(target=_child, args=(list(task.argv), str(task.log)), name=task.name)
            process.start()
            running[task] = process


def _here(task: Task) -> int:
    """Run a task in this process, its output in its log."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return _command(list(task.argv))


def _command(argv: list[str]) -> int:
    print(f"$ dbd {' '.join(argv)}", flush=True)
    try:
        return main(argv)
    except SystemExit as end:  # tyro's own way out
        return end.code if isinstance(end.code, int) else 1
    except Exception:  # the log tells it, and the other runs of the table go on
        import traceback

        traceback.print_exc()
        return 1


def _child(argv: list[str], log: str) -> None:
    """Run a command in this process, which ends with its parent."""
    os.setsid()  # Ctrl-C reaches the parent alone, which passes it on once: a second one would end the run at once
    threading.Thread(target=_end_with_parent, daemon=True).start()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(_command(argv))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of ending."""
    asked: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda found, _: asked.append(found))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _forward(asked: list[int], running: Mapping[Task, BaseProcess]) -> None:
    """Pass every request on, each once."""
    for process in running.values():
        passed = getattr(process, "_requests_passed", 0)
        for number in asked[passed:]:
            with contextlib.suppress(ProcessLookupError):
                assert process.pid is not None
                os.kill(process.pid, number)
        process._requests_passed = len(asked)  # type: ignore[attr-defined]


def _stopped(code: int) -> Stopped:
    reason = next(name for name, number in EXIT_CODES.items() if number == code)
    return Stopped(f"stopped ({reason})", hint="the same command resumes", exit_code=code)
