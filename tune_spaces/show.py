"""What a sweep says on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from dbd_dist.reporting.wording import duration, printable
from tune_spaces import tables
from tune_spaces.book import Book, Row
from tune_spaces.plan import Plan
from tune_spaces.trial import run_names

WATCH_S = 30.0
"""Between two lines on what runs."""


class Show:
    """Prints a line for everything that happens."""

    def __init__(self, plan: Plan, book: Book):
        self._plan, self._book = plan, book
        self._watched = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, parallel: int) -> None:
        """What will be done."""
        plan, done = self._plan, sum(map(self._book.ended, self._book.rows))
        fields = ", ".join(f"{field} {given}" for field, given in plan.vary.items())
        seeds = f" of {len(plan.seeds)} seeds each" if len(plan.seeds) > 1 else ""
        there = f", {done} of them finished" if done else ""
        self.say(f"{plan.search} search: {plan.trials} trials{seeds}, {parallel} at a time{there}")
        self.say(f"varied: {fields}")
        shared = tables.shared(plan)
        if shared:
            self.say("to train: " + ", ".join(f"{stage} {count} x" for stage, count in shared.items()))

    def ended(self, row: Row) -> None:
        """A trial has ended."""
        self._watched = time.monotonic()
        count = sum(one["status"] != "running" for one in self._book.rows.values())
        values = ", ".join(f"{field} {tables.cell(value)}" for field, value in row["values"].items())
        said = f"trial {row['number']} ({count} of {self._plan.trials}): {values}"
        if row["status"] == "failed":
            self.say(f"{said}: failed: {printable(row['message'], 300)}")
            return
        metrics = ", ".join(
            f"{name} {tables.cell(row['metrics'].get(name))}" for name in tables.shown_metrics(self._plan)
        )
        if "too_visible_by" in row["metrics"]:
            metrics = f"too visible (PSNR {tables.cell(row['metrics'].get('psnr_db'))} dB), not trained on"
        notes = [duration(row["seconds"])] if "seconds" in row else []
        reused = [stage for stage, one in row.get("stages", {}).items() if one["reused"]]
        notes += [f"reused {', '.join(reused)}"] if reused else []
        notes += [f"waited {duration(row['waited_s'])}"] if row.get("waited_s") else []
        early = f" [stopped early, epoch {row['epoch']}]" if row["status"] == "stopped" else ""
        self.say(f"{said} -> {metrics}{early} ({'; '.join(notes)}){self._best()}")

    def _best(self) -> str:
        best = self._book.best()
        if best is None:
            return ""
        if len(self._plan.metrics) > 1:
            return f" | Pareto front: {', '.join(str(row['number']) for row in self._book.front())}"
        name = next(iter(self._plan.metrics)).name
        return f" | best: trial {best['number']}, {name} {tables.cell(best['metrics'].get(name))}"

    def watch(self, running: Sequence[int]) -> None:
        """Where the running trials are, twice a minute."""
        if time.monotonic() - self._watched < WATCH_S:
            return
        self._watched = time.monotonic()
        places = [f"trial {number}: {self._place(number)}" for number in sorted(running)]
        if places:
            self.say(f"running: {'; '.join(places)}")

    def _place(self, number: int) -> str:
        """From the progress files of its runs."""
        names = run_names(self._plan.name, number, list(self._plan.seeds)).values()
        for folder in (self._plan.storage / name for name in names):
            for path in (folder / "progress.json", *sorted(folder.glob("*/progress.json"))):
                try:
                    state: dict[str, Any] = json.loads(path.read_text())
                    return str(state.get("says") or f"{state['stage']}, epoch {state['epoch']} of {state['epochs']}")
                except (OSError, ValueError, KeyError):
                    continue
        return "starting"
