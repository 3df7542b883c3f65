"""Timing of several things side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Work = Callable[[], object]


def rounds(
    works: Mapping[str, Work],
    *,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every work, in `repeats` rounds that run all of them one after the other.

    A busy neighbour so slows each of them, and ratios within a round stand. Rounds of warm-up are not counted. On CUDA
    the time is that between two events on the stream, each work starting on an idle device; host time counts where the
    device waits for it.

    Args:
        clock: for devices other than CUDA; `time.thread_time` leaves out what other processes took of one thread,
            `time.process_time` counts all threads of this process.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(warm_up + repeats):
        for name, work in works.items():
            seconds = _seconds(work, device, clock)
            if repeat >= warm_up:
                times[name].append(seconds)
    return times


def _seconds(work: Work, device: torch.device, clock: Callable[[], float]) -> float:
    if device.type != "cuda":
        start = clock()
        work()
        return clock() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000
