"""Sends cases to a child process, starts another where it dies or hangs, and counts."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
HANG_S = 60


@dataclass
class Summary:
    """What came of all cases."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """By target: worked, refused, failed."""
    failures: list[tuple[str, str, str]] = field(default_factory=list)
    """Target, seed, what happened."""

    def add(self, target: str, seed: str, outcome: str, detail: str) -> None:
        self.outcomes.setdefault(target, Counter())[outcome] += 1
        if outcome not in ("worked", "refused"):
            self.failures.append((target, seed, detail))

    def text(self) -> str:
        head = f"{'target':<12}{'cases':>8}{'worked':>8}{'refused':>8}{'failed':>8}"
        lines = [head]
        total: Counter[str] = Counter()
        for target, counts in sorted(self.outcomes.items()):
            lines.append(_row(target, counts))
            total += counts
        lines.append(_row("all", total))
        for target, seed, detail in self.failures:
            reason = detail.strip().splitlines()[-1][:300]
            lines.append(f"\nfailed: python -m tests.fuzz --target {target} --case {seed}\n  {reason}")
        return "\n".join(lines)


def _row(name: str, counts: Counter[str]) -> str:
    cells = "".join(f"{counts[outcome]:>8}" for outcome in ("worked", "refused", "failed"))
    return f"{name:<12}{sum(counts.values()):>8}{cells}"


class Child:
    """The process that runs cases."""

    def __init__(self, hang_s: float = HANG_S) -> None:
        self._hang_s = hang_s
        self._root = Path(tempfile.mkdtemp(prefix="dbd-fuzz-"))
        self._start()

    def _start(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
        self._root.mkdir()
        self._log = open(self._root.with_suffix(".log"), "w+b")  # noqa: SIM115
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.child", str(self._root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, cwd=CHECKOUT, env=environ,
        )  # fmt: skip
        reply = self._reply(180)
        assert reply == ("ready", ""), reply

    def run(self, target: str, seed: str) -> tuple[str, str]:
        """One case: its outcome, and what happened where it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([target, seed]).encode() + b"\n")
        self._process.stdin.flush()
        outcome, detail = self._reply(self._hang_s)
        if outcome == "gone":
            self.close()
            self._start()
            return "failed", detail
        return outcome, detail

    def _reply(self, seconds: float) -> tuple[str, str]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                return "gone", f"no answer within {seconds} s"
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._log.seek(0)
            return "gone", f"{self._log.read()[-3000:].decode(errors='replace')}\nthe process ended with {code}"
        outcome, detail = json.loads(answer)
        return outcome, detail

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()
        self._root.with_suffix(".log").unlink(missing_ok=True)
        shutil.rmtree(self._root, ignore_errors=True)


@contextmanager
def child(hang_s: float = HANG_S) -> Iterator[Child]:
    process = Child(hang_s)
    try:
        yield process
    finally:
        process.close()


def fuzz(
    process: Child, targets: dict[str, int], seed: int, *, until: float | None = None, rounds: int | None = None
) -> Summary:
    """Run cases in turn, each target as often as its weight says.

    Args:
        process: that runs them.
        targets: names and weights.
        seed: of all cases; case n of a target has the seed "SEED:n".
        until: `time.monotonic()` to stop at.
        rounds: to stop after.
    """
    summary, numbers = Summary(), dict.fromkeys(targets, 0)
    turn = 0
    while (until is None or time.monotonic() < until) and (rounds is None or turn < rounds):
        turn += 1
        for target, weight in targets.items():
            for _ in range(weight):
                label = f"{seed}:{numbers[target]}"
                numbers[target] += 1
                summary.add(target, label, *process.run(target, label))
    return summary
