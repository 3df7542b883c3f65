"""A node goes, and the run goes on with what is left: two Ray nodes on this machine, one of them killed.

    python -m tests.elastic [--epochs 300] [--work runs/elastic]

A run on two workers (`compute.min_workers` 1), one a node, loses a node after its twentieth epoch; Ray takes a minute
and more to notice, and starts one worker from the last checkpoint. Then a node comes back, which Ray Train may take in
again before the end or not. What must hold: a result, and every epoch once in metrics.jsonl. Exit code 1 otherwise.
Minutes long, therefore not among the tests.
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

from dbd_dist.launch import run_ray
from tests.soak import RUN, configurations, make_data

LOSE_AFTER, BACK_AFTER = 20, 20
"""Epochs before the node goes; epochs on one worker before one comes back."""
WAIT_S = 300.0


def rows(storage: Path) -> list[dict[str, Any]]:
    path = storage / RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def starts(storage: Path) -> list[dict[str, Any]]:
    """What the workers' logs say of starting and going on, in order."""
    found = []
    for path in (storage / RUN / "logs").glob("rank*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found += [event for event in events if event["event"] in ("start", "resumed", "finish")]
    return sorted(found, key=lambda event: event["time"])


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
        config,
        supervised=replace(config.supervised, epochs=arguments.epochs),
        evaluate_every=0,
        compute=replace(config.compute, min_workers=1, checkpoint_steps=None),
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
    cluster.remove_node(node, allow_graceful=False)
    wait_for("one worker alone", lambda: any(e.get("world_size") == 1 for e in starts(work)), run)
    before = len(rows(work))
    wait_for(f"{BACK_AFTER} epochs on it", lambda: len(rows(work)) >= before + BACK_AFTER, run)
    cluster.add_node(num_cpus=1)
    run.join(WAIT_S)
    for event in starts(work):
        print(
            event["time"][11:19], f"rank {event['rank']}", event["event"], event.get("world_size") or event.get("after")
        )
    ray.shutdown()
    cluster.shutdown()
    whole = [row["epoch"] for row in rows(work)] == list(range(1, arguments.epochs + 1))
    if not results or not whole:
        print("failed: " + ("no result" if not results else "metrics.jsonl does not hold every epoch once"))
        return 1
    print(f"a result from a world of {results[0]['world_size']}, every epoch once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
