"""A node is preempted after notice, and the run continues with what is left: two Ray nodes on this machine, one of them
drained as before a preemption and then killed.

    python -m tests.elastic [--epochs 300] [--work runs/elastic]

A run on two workers (`compute.min_workers` 1), one a node, keeps a checkpoint every hour. After its twentieth epoch Ray
gives notice that a node will be taken away: a checkpoint must follow. Then the node is killed; Ray takes a minute and
more to notice, and starts one worker from that checkpoint. Then a node comes back, which Ray Train may take in again
before the end or not. What must hold: a result, every epoch once in metrics.jsonl, and none before the notice trained
again. Exit code 1 otherwise. Minutes long, therefore not among the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dbd_dist.config import override
from dbd_dist.launch.ray_train import run_ray
from tests.soak import RUN, configurations, make_data

LOSE_AFTER, BACK_AFTER = 20, 20
"""Epochs before the notice; epochs on one worker before a node comes back."""
NOTICE = "a node will be preempted"
WAIT_S = 300.0


def rows(storage: Path) -> list[dict[str, Any]]:
    path = storage / RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(storage: Path, *names: str) -> list[dict[str, Any]]:
    """What the workers' logs say of events of these names, in order."""
    found = []
    for path in (storage / RUN / "logs").glob("rank*.jsonl"):
        said = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found += [event for event in said if event["event"] in names]
    return sorted(found, key=lambda event: event["time"])


def give_notice(address: str, node_id: str) -> None:
    """What a cloud's provider, or an autoscaler, tells Ray before it takes a node away."""
    from ray import _raylet
    from ray.core.generated import autoscaler_pb2

    deadline_ms = int(time.time() * 1000) + 60_000
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = _raylet.GcsClient(address=address).drain_node(node_id, reason, "tests.elastic", deadline_ms)
    if not accepted:
        raise SystemExit(f"Ray takes no notice: {why}")


def wait_for(what: str, condition: Callable[[], bool], thread: threading.Thread) -> None:
    """Until it holds or the run has ended.

    Raises:
        SystemExit: it does not come to hold.
    """
    end = time.monotonic() + WAIT_S
    while not condition():
        if not thread.is_alive() or time.monotonic() > end:
            raise SystemExit(f"waited in vain for {what}")
        time.sleep(0.2)
    print(what, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.elastic", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--work", type=Path, default=Path("runs/elastic"))
    arguments = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # nodes of one machine, for minutes
    import ray
    from ray.cluster_utils import Cluster

    work = arguments.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    config = configurations(make_data(work / "datasets"))["none-2"]
    config = replace(
        override(config, {"supervised.epochs": arguments.epochs}),
        evaluate_every=0,
        compute=replace(config.compute, min_workers=1, checkpoint_steps=None, checkpoint_s=3600.0),
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    results: list[Any] = []
    run = threading.Thread(
        target=lambda: results.append(run_ray(config, storage=work, name=RUN, quiet=True)), daemon=True
    )
    run.start()
    wait_for(f"{LOSE_AFTER} epochs on two workers", lambda: len(rows(work)) >= LOSE_AFTER, run)
    give_notice(cluster.address, node.node_id)
    wait_for("notice taken", lambda: bool(events(work, NOTICE)), run)
    told = events(work, NOTICE)[0]
    wait_for("a checkpoint for it", lambda: bool(events(work, "checkpoint written")), run)
    cluster.remove_node(node, allow_graceful=False)
    wait_for("one worker alone", lambda: any(e["world_size"] == 1 for e in events(work, "start")), run)
    before = len(rows(work))
    wait_for(f"{BACK_AFTER} epochs on it", lambda: len(rows(work)) >= before + BACK_AFTER, run)
    cluster.add_node(num_cpus=1)
    run.join(WAIT_S)
    for event in events(work, "start", "resumed", "finish", NOTICE, "checkpoint written"):
        told_of = event.get("world_size") or event.get("after") or ""
        print(event["time"][11:19], f"rank {event['rank']}", event["event"], told_of)
    ray.shutdown()
    cluster.shutdown()
    failures = [] if results else ["no result"]
    if [row["epoch"] for row in rows(work)] != list(range(1, arguments.epochs + 1)):
        failures.append("metrics.jsonl does not hold every epoch once")
    resumed = events(work, "resumed")
    if not resumed or resumed[0]["after"] != told["after"]:
        failures.append(f"it did not go on from {told['after']}, where notice was given")
    if failures:
        print("failed: " + "; ".join(failures))
        return 1
    print(f"a result from a world of {results[0]['world_size']}, every epoch once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
