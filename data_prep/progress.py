"""Progress of a long loop: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Counts images; shows a bar where stderr is a terminal, else a line every ten seconds. A context
    manager."""

    def __init__(self, title: str, total: int, *, show: bool = True):
        self._title, self._total, self._done = title, total, 0
        self._start = self._said = time.monotonic()
        self._bar = None
        self._plain = show and not sys.stderr.isatty()
        if show and not self._plain:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=" images", unit_scale=True)

    def add(self, count: int) -> None:
        """`count` more images are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._plain and time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._start)
            left_s = (self._total - self._done) / rate
            line = f"{self._title}: {self._done}/{self._total} images, {rate:.0f}/s, {left_s:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
