"""Two processes that stay up and run functions as the two ranks of a gloo group: the tests that need ranks share them.

The functions are sent by name, so they live in modules that a fresh process can import (`tiny`), not in test files.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dbd_dist.distributed.world import World

SIZE = 2
ANSWER_S = 60.0  # a rank that waits for the other one for ever must not hang the tests


class TwoRanks:
    """Call it with a function of (World, ...): both ranks run it, and the list of both results comes back."""

    def __init__(self, store: Path):
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store.as_uri(), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        assert self._pipes, "the ranks were stopped after an earlier failure"
        for pipe in self._pipes:
            pipe.send((function, arguments, options))
        results, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(ANSWER_S):
                failures.append(f"rank {rank} gave no answer in {ANSWER_S:.0f} s")
                continue
            good, result = pipe.recv()
            (results if good else failures).append(result)
        if failures:
            self.close()  # where one rank failed, the other may still wait for it inside a collective
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join()
        self._pipes, self._processes = [], []


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=30))
    world = World.current(torch.device("cpu"))
    while True:
        try:
            function, arguments, options = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(world, *arguments, **options))
        except Exception:
            answer = (False, f"rank {rank}:\n{traceback.format_exc()}")
        # by value, as bytes: tensors would otherwise travel as shared memory that outlives neither end cleanly
        pipe.send(_plain(answer))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().copy()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    return value
