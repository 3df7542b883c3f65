"""The progress of a run: a small file that the training writes and the driver shows."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data_prep.io.atomic import write_text

if TYPE_CHECKING:
    from tqdm import tqdm


class ProgressFile:
    """Written by rank 0 of the training, at most twice a second; a reader finds a whole file or none. Best effort."""

    def __init__(self, path: Path, interval_s: float = 0.5, check: Callable[[], None] = lambda: None):
        self._path, self._interval, self._check = path, interval_s, check
        self._next = 0.0
        self._stage = ""
        self._metrics: dict[str, Any] = {}

    def tick(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """Note that `step` of `steps` in `epoch` of `epochs` is queued. Costs a clock reading between writes."""
        now = time.monotonic()
        if now < self._next and not (step == steps and epoch == epochs):
            return
        self._next = now + self._interval
        if stage != self._stage:  # metrics of one stage mean nothing in the next
            self._stage, self._metrics = stage, {}
        self._write({"stage": stage, "epoch": epoch, "epochs": epochs, "step": step, "steps": steps, **self._metrics})

    def say(self, stage: str, text: str) -> None:
        """Show a sentence in the place of a position."""
        self._stage = ""
        self._write({"stage": stage, "epoch": 1, "epochs": 1, "step": 0, "steps": 1, "says": text})

    @contextmanager
    def saying(self, text: str, after_s: float = 10.0) -> Iterator[None]:
        """Show a sentence once the body has taken that long."""
        timer = threading.Timer(after_s, self.say, ("", text))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # nothing is written after the end

    def note(self, metrics: dict[str, Any]) -> None:
        """Keep the last epoch's metrics beside the position."""
        self._metrics = {
            k: metrics[k] for k in ("loss", "images_per_s", "clean_acc", "asr") if metrics.get(k) is not None
        }

    def _write(self, state: dict[str, Any]) -> None:
        with suppress(OSError):  # a progress bar must not end a run
            self._check()
            write_text(self._path, json.dumps(state))

    def remove(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


class Display:
    """A bar with rate and time left on a terminal, a plain line every so often elsewhere."""

    def __init__(self, stream: TextIO | None = None, line_every_s: float = 15.0):
        self._stream = stream or sys.stderr
        self._line_every, self._last_line = line_every_s, 0.0
        self._bar: tqdm | None = None
        self._stage = ""
        self._start = (time.monotonic(), 0)

    def show(self, state: dict[str, Any]) -> None:
        """Show one state of a `ProgressFile`."""
        if "says" in state:
            self.close()
            self._stage = ""
            print(state["says"], file=self._stream, flush=True)
            return
        total = state["epochs"] * state["steps"]
        done = (state["epoch"] - 1) * state["steps"] + state["step"]
        figures = []
        if "loss" in state:
            figures.append(f"loss {state['loss']:.3f}")
        if "images_per_s" in state:
            figures.append(f"{state['images_per_s']:,.0f} images/s")
        if "clean_acc" in state:
            figures.append(f"accuracy {state['clean_acc']:.3f}")
        if "asr" in state:
            figures.append(f"attack success {state['asr']:.3f}")
        text = ", ".join(figures)
        new_stage = state["stage"] != self._stage
        if new_stage:
            self.close()
            self._stage, self._start = state["stage"], (time.monotonic(), done)
        if self._stream.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(
                    total=total, initial=done, unit="step", file=self._stream, dynamic_ncols=True, leave=True,
                    bar_format="{desc} |{bar}| {n}/{total} [{elapsed}<{remaining}, {rate_fmt}] {postfix}",
                )  # fmt: skip
            self._bar.set_description_str(f"{self._stage:<10} epoch {state['epoch']}/{state['epochs']}")
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(max(done - self._bar.n, 0))
            return
        now = time.monotonic()
        if new_stage or now - self._last_line >= self._line_every or done == total:
            self._last_line = now
            since, first = self._start
            left = (total - done) * (now - since) / (done - first) if done > first else None
            remaining = "" if left is None else f", {left:.0f} s left in this stage"
            print(
                f"{self._stage}: epoch {state['epoch']}/{state['epochs']}, step {state['step']}/{state['steps']}"
                f"{remaining}{', ' + text if text else ''}",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Follower:
    """Shows a progress file while the body of a ``with`` runs, from a thread of its own."""

    def __init__(self, path: Path, display: Display, interval_s: float = 0.5):
        self._path, self._display, self._interval = path, display, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def _follow(self) -> None:
        seen = None
        while True:
            last_round = self._stop.wait(self._interval)
            try:
                text = self._path.read_text()
            except OSError:  # not there yet, or removed
                text = None
            if text and text != seen:
                seen = text
                with suppress(OSError):  # nobody reads stderr any more, or its disk is full
                    self._display.show(json.loads(text))
            if last_round:
                return

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        self._display.close()
