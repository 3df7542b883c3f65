"""The link between two nodes is cut in the middle of a run: two Ray nodes in network namespaces, a worker on each.

    python -m tests.link_cut [--epochs 60] [--work runs/link_cut] [--only CASE ...] [--json FILE]

Cases, each on a cluster of its own, after a run that nothing disturbs:

    brief    back after 5 s: nothing is started again, the same bytes
    fixed    two workers are wanted: the loss is said, and what the run then waits for; once the link is back and the
             node has joined again the run ends with the same bytes
    elastic  `compute.min_workers` 1, the link stays cut: one worker goes on alone, and ends with the same losses up to
             the rounding that another number of workers makes (CLOSE)

The loss has to be one line of the command's output that names rank and node. Exit code 1 where anything does not hold.
Needs root. Minutes long, therefore not among the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dbd_dist.config import TrainConfig, override
from dbd_dist.fields import to_dict
from tests.benchmarks.record import record
from tests.namespaces import ADDRESSES, Pair
from tests.soak import RUN, configurations, make_data, outcome

CUT_AFTER = 20
"""Epochs before the cut."""
BRIEF_S = 5.0
CLOSE = 1e-3
"""Largest difference of an epoch's loss, and of accuracy and attack success at the end, between two workers and one."""
WAIT_S = 420.0
LOST = re.compile(r"^rank \d+ .*(machine|reached|killed).*" + re.escape(ADDRESSES[1]) + r".*start.*again.*", re.M)
WAITS = "waiting for 2 CPUs; the cluster has 1"


@dataclass(kw_only=True)
class Command:
    """A `dbd train` on the first machine."""

    process: subprocess.Popen
    output: Path
    storage: Path
    times: dict[str, float] = field(default_factory=dict)
    """Seconds from the cut."""
    cut_at: float = 0.0

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def rows(self) -> list[dict[str, Any]]:
        path = self.storage / RUN / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def events(self, *names: str) -> list[dict[str, Any]]:
        """What the logs say of events of these names, in order."""
        found = []
        for path in (self.storage / RUN / "logs").glob("*.jsonl"):
            said = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            found += [event for event in said if event["event"] in names]
        return sorted(found, key=lambda event: event["time"])

    def until(self, what: str, holds: Callable[[], object]) -> None:
        """Wait, and note how long after the cut it held.

        Raises:
            SystemExit: the run has ended before, or it takes too long.
        """
        end = time.monotonic() + WAIT_S
        while not holds():
            if self.process.poll() is not None and not holds():
                raise SystemExit(f"the run ended ({self.process.returncode}) before: {what}\n{self.text()}")
            if time.monotonic() > end:
                raise SystemExit(f"waited in vain for: {what}\n{self.text()}")
            time.sleep(0.2)
        self.note(what)

    def note(self, what: str) -> None:
        if self.cut_at:
            self.times[what] = round(time.monotonic() - self.cut_at, 1)
        print(f"  {what}" + (f", {self.times[what]} s after the cut" if self.cut_at else ""), flush=True)

    def ended(self) -> None:
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the run does not end\n{self.text()}") from None
        self.note(f"ended with {self.process.returncode}")


@contextmanager
def training(config: TrainConfig, work: Path) -> Iterator[tuple[Pair, Command]]:
    """A run on a new pair of machines."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    described = work / "run.json"
    described.write_text(json.dumps({"config": to_dict(config)}))
    words = [sys.executable, "-m", "dbd_dist", "train", "--config", str(described), "--name", RUN]
    with tempfile.TemporaryDirectory(prefix="lc") as temporary, Pair(Path(temporary) / "r") as pair:
        for machine in pair.machines:
            machine.start_ray()
        with open(work / "output", "w") as output:
            command = pair.machines[0].command([*words, "--storage", str(work)])
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        yield pair, Command(process=process, output=work / "output", storage=work)


def cut(pair: Pair, run: Command) -> None:
    run.until(f"{CUT_AFTER} epochs", lambda: len(run.rows()) >= CUT_AFTER)
    run.cut_at = time.monotonic()
    pair.cut()


def brief(pair: Pair, run: Command) -> None:
    cut(pair, run)
    time.sleep(BRIEF_S)
    pair.mend()
    run.note("link back")
    before = len(run.rows())
    run.until("next epoch", lambda: len(run.rows()) > before)
    run.ended()


def fixed(pair: Pair, run: Command) -> None:
    cut(pair, run)
    run.until("loss said", lambda: LOST.search(run.text()))
    run.until("waiting said", lambda: WAITS in run.text())
    pair.mend()
    second = pair.machines[1]
    run.until("Ray ended on the lost node", lambda: not second.has("raylet"))
    second.start_ray()
    run.note("node joined again")
    before = len(run.rows())
    run.until("next epoch", lambda: len(run.rows()) > before)
    run.ended()


def elastic(pair: Pair, run: Command) -> None:
    cut(pair, run)
    run.until("loss said", lambda: LOST.search(run.text()))
    run.until("one worker alone", lambda: any(event["world_size"] == 1 for event in run.events("start")))
    run.ended()


CASES = {"brief": brief, "fixed": fixed, "elastic": elastic}


def wrong_with(case: str, run: Command, reference: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """What does not hold after a case; adds what was measured to `figures`."""
    if run.process.returncode != 0:
        return [f"exit code {run.process.returncode}: {run.text()[-2000:]}"]
    mine, wrong = outcome(run.storage), []
    starts = len({event["time"][:19] for event in run.events("start") if event["rank"] == 0})
    figures["times workers were started"] = starts
    figures["lines about the loss"] = len(LOST.findall(run.text()))
    if [row["epoch"] for row in mine["rows"]] != [row["epoch"] for row in reference["rows"]]:
        wrong.append("metrics.jsonl does not hold every epoch once")
    else:
        figures["largest difference of a loss"] = max(
            abs(a["loss"] - b["loss"]) for a, b in zip(mine["rows"], reference["rows"], strict=True)
        )
    figures["same bytes"] = mine["bytes"] == reference["bytes"] and mine["rows"] == reference["rows"]
    if (starts, figures["lines about the loss"]) != ((1, 0) if case == "brief" else (2, 1)):
        wrong.append(f"{starts} starts, {figures['lines about the loss']} lines about a loss")
    if case == "elastic":
        apart = [abs(mine["result"][name] - reference["result"][name]) for name in ("clean_acc", "asr")]
        figures["largest difference of accuracy and attack success"] = max(apart)
        if not max([*apart, figures.get("largest difference of a loss", 0.0)]) <= CLOSE:
            wrong.append("its numbers are not those of the undisturbed run")
        if mine["result"]["world_size"] != 1:
            wrong.append(f"a result from a world of {mine['result']['world_size']}")
    elif not figures["same bytes"]:
        wrong.append("its weights or rows are not those of the undisturbed run")
    if "Traceback" in run.text():
        wrong.append("a traceback")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.link_cut", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path("runs/link_cut"))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    config = configurations(make_data(work / "datasets"))["none-2"]
    config = replace(override(config, {"supervised.epochs": arguments.epochs}), evaluate_every=0)
    print("undisturbed", flush=True)
    with training(config, work / "undisturbed") as (_, run):
        run.ended()
    if run.process.returncode != 0:
        raise SystemExit(run.text())
    reference, failures, rows = outcome(run.storage), [], []
    for case in arguments.only:
        print(case, flush=True)
        fewest = 1 if case == "elastic" else None
        with training(replace(config, compute=replace(config.compute, min_workers=fewest)), work / case) as (pair, run):
            CASES[case](pair, run)
        measured: dict[str, Any] = {"case": case, "seconds after the cut": run.times}
        wrong = wrong_with(case, run, reference, measured)
        measured["said"] = [match.group() for match in LOST.finditer(run.text())]
        rows.append(measured)
        failures += [f"{case}: {what}" for what in wrong]
    note = "two network namespaces of one machine, the driver on the first; the second's link is cut"
    record(arguments.json, rows, command=f"python -m tests.link_cut --epochs {arguments.epochs}", note=note)
    print("\n".join(["failed:", *failures] if failures else ["all as it must be"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
