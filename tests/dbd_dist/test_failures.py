"""What Ray raises becomes one message that says what ended, where, why, and what to do."""

import json
import pickle
import subprocess
import sys

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from dbd_dist.cli import main
from dbd_dist.launch.failures import RunFailed, run_failed
from dbd_dist.runtime.run_folder import ERROR_FILE, RAY_FOLDER, STARTED_FILE

CONNECTION_LOST = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
"""As Ray 2.60 puts it for a process that was killed."""


def died(message: str, *, name: str = "RayTrainWorker", pid: int = 4711) -> ActorDiedError:
    return ActorDiedError(
        ActorDiedErrorContext(
            actor_id=bytes(16), class_name=name, pid=pid, node_ip_address="192.0.2.7", error_message=message
        )
    )


def health(error: Exception) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError(f"A worker health check failed.\n{error}", failure=error)


def task_error(cause: Exception, function: str) -> RayTaskError:
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in {function}\n{type(cause).__name__}: {cause}'
    return RayTaskError(function, trace, cause, pid=4711, ip="192.0.2.7").as_instanceof_cause()


def workers(**failures: Exception) -> WorkerGroupError:
    by_rank = {int(name.removeprefix("rank")): error for name, error in failures.items()}
    return WorkerGroupError("\n".join(f"[Rank {r} Error Snippet]:\n{e}" for r, e in by_rank.items()), by_rank)


PEER = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [192.0.2.7]:4133")

CASES = {
    "a killed worker, and what its peer says": (
        workers(rank0=PEER, rank1=health(died(CONNECTION_LOST))),
        ["rank 1 (and 1 other rank after it) was killed", "pid 4711", "node 192.0.2.7", "SIGKILL"],
    ),
    "an exception of one rank, and what its peers say": (
        workers(rank0=PEER, rank1=PEER, rank2=ValueError("first line\nno such class: 7")),
        ["rank 2 (and 2 other ranks after it) ended with ValueError: no such class: 7"],
    ),
    "an exception of all ranks": (
        workers(rank0=KeyError("x"), rank1=KeyError("x")),
        ["rank 0 (and 1 other rank after it) ended with KeyError: 'x'"],
    ),
    "a worker that Ray's memory monitor ended": (
        workers(
            rank0=health(OutOfMemoryError("Task was killed due to the node running low on memory.\nip: 192.0.2.7"))
        ),
        ["rank 0 was ended because the memory of its machine ran out", "192.0.2.7", "smaller batches"],
    ),
    "the same of its memory, as an actor": (
        workers(rank0=health(died("1 worker(s) were killed due to the node running low on memory. Memory used: 9GB"))),
        ["rank 0 was ended because the memory of its machine ran out", "192.0.2.7"],
    ),
    "a machine that went": (
        workers(rank3=health(died("The actor died because its node has died. Node Id: abcdef0123"))),
        ["rank 3 ended with its machine", "192.0.2.7"],
    ),
    "the same, said otherwise": (
        workers(rank3=health(NodeDiedError("node is dead. Node Id: abcdef0123"))),
        ["rank 3 ended with its machine (node abcdef0123)"],
    ),
    "a worker that does not answer": (
        workers(rank1=WorkerHealthCheckTimeoutError("A worker health check has been hanging for 612 seconds.")),
        ["rank 1 ended with WorkerHealthCheckTimeoutError", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"],
    ),
    "a worker out of reach": (
        workers(rank1=health(ActorUnavailableError("RpcError: connection refused", bytes(16)))),
        ["rank 1 cannot be reached"],
    ),
    "a killed controller": (
        died(CONNECTION_LOST, name="TrainController"),
        ["Ray Train's controller was killed (pid 4711, node 192.0.2.7)"],
    ),
    "no process group": (
        ControllerError(task_error(RuntimeError("Unable to find interface for: [eth7]"), "_setup_torch_process_group")),
        ["could not form a process group (Unable to find interface for: [eth7])", "GLOO_SOCKET_IFNAME", "dbd doctor"],
    ),
    "no resources in time": (
        ControllerError(WorkerGroupStartupTimeoutError(num_workers=8)),
        ["no resources for 8 workers", "`ray status`"],
    ),
    "no resources at all": (
        ControllerError(InsufficientClusterResourcesError("cannot be satisfied")),
        ["no resources for the workers", "`ray status`"],
    ),
    "a worker killed while the group was started": (
        ControllerError(died(CONNECTION_LOST)),
        ["a worker that was being started was killed (pid 4711"],
    ),
    "an error of the controller": (
        ControllerError(ValueError("no such state")),
        ["controller ended with ValueError: no such state"],
    ),
    "anything else": (RuntimeError("a\nb"), ["the run ended with RuntimeError: b"]),
    "a sentence": ("raylet (pid 1) was ended by SIGKILL", ["raylet (pid 1) was ended by SIGKILL. Hint:"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_says_what_where_why_and_what_to_do(case):
    why, parts = CASES[case]
    message = str(run_failed(why, where="runs/mine", resumes_from="mixmatch, epoch 3"))
    assert message.startswith("runs/mine: ")
    assert message.endswith("the same command resumes from mixmatch, epoch 3.")
    for part in parts:
        assert part in message
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 600
    if "memory" not in case:
        assert "smaller batches" not in message


def test_without_a_checkpoint_the_run_starts_again():
    assert "the same command starts it again" in str(run_failed("x", where="runs/mine"))


def test_too_many_failures_are_counted_for_workers_alone():
    error = workers(rank0=health(died(CONNECTION_LOST)))
    assert "; the workers had been started 4 times. Hint:" in str(run_failed(error, where="x", tries=4))
    assert "4 times" not in str(run_failed(died(CONNECTION_LOST), where="x", tries=4))
    assert "times" not in str(run_failed(error, where="x", tries=1))


def test_long_messages_are_cut():
    message = str(run_failed(workers(rank0=RuntimeError("word " * 1000)), where="x"))
    assert len(message) < 500
    assert "..." in message


def test_the_message_survives_the_trip_between_processes():
    error = run_failed("the raylet ended", where="x", resumes_from="warmup, epoch 1")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.what, again.where, again.hint) == (error.what, error.where, error.hint)


def test_the_command_says_it_once_and_exits_with_1(monkeypatch, capsys):
    def fail(argv):
        raise RunFailed("the raylet ended", where="runs/mine", hint="the same command resumes")

    monkeypatch.setattr("dbd_dist.commands.train.main", fail)
    assert main(["train", "smoke"]) == 1
    assert capsys.readouterr().err == "error: runs/mine: the raylet ended. Hint: the same command resumes.\n"
    with pytest.raises(RunFailed):
        main(["train", "smoke", "--debug"])


def test_workers_that_are_started_again_are_said_to_be(tmp_path):
    """Once for each time; not where the command ends with a message of its own."""
    from dbd_dist.launch.worker import RetryLog

    lost = {0: PEER, 1: health(died("The actor died because its node has died. Node Id: abcdef0123"))}
    started = tmp_path / RAY_FOLDER / "mine" / STARTED_FILE
    started.parent.mkdir(parents=True)
    started.touch()
    progress = tmp_path / "progress.json"
    log = RetryLog(tmp_path, "mine", retries=2)

    (tmp_path / ERROR_FILE).write_text("{}")
    log.after_exception(None, lost)
    assert started.exists()
    (tmp_path / ERROR_FILE).unlink()
    assert not progress.exists()
    (tmp_path / "metrics.jsonl").write_text('{"stage": "warmup", "epoch": 3}\n')
    log.after_exception(None, lost)
    assert not started.exists()
    assert json.loads(progress.read_text())["says"] == (
        "rank 1 (and 1 other rank after it) ended with its machine (pid 4711, node 192.0.2.7); the workers are started "
        "again from about warmup, epoch 3 (restart 2 of 2)"
    )
    progress.unlink()
    log.after_exception(None, lost)  # Ray Train gives up
    assert not progress.exists()
    logged = (tmp_path / "logs" / "driver.jsonl").read_text().splitlines()
    assert [json.loads(line)["failed_rank"] for line in logged] == [0, 1] * 3


def test_the_command_needs_no_ray_for_it():
    code = "import sys, dbd_dist.launch.failures; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
