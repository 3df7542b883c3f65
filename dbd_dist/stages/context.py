"""What every stage is given, and what it hands back after each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.loaders import Images
from dbd_dist.sampling import rank_slice
from dbd_dist.world import World

Step = TypeVar("Step")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class EpochEnd:
    """An epoch is over: what it measured, and all that is needed to go on from here."""

    stage: str
    epoch: int
    """Counts from 1."""
    epochs: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]]
    """The stage's state, tensors and plain values, to be handed back to it as `resume`."""
    model: nn.Module
    kept: Tensor | None = None
    """The split in force, bool (N,), where there is one."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of a stage, the same for all of them."""

    world: World
    images: Images
    num_classes: int
    seed: int
    bf16: bool
    sync_bn: bool
    compile: bool = False
    """Compile the networks that `prepare` is given."""
    cuda_graphs: bool = False
    """Replay recorded steps where a stage can."""
    report: Callable[[EpochEnd], None]
    tick: Callable[[str, int, int, int, int], None] = field(default=lambda *_: None)
    """Called every step with (stage, epoch, epochs, step, steps); must not wait for the device."""

    def generator(self, *names: str | int) -> torch.Generator:
        return seeds.generator(self.seed, *names)

    def mine(self, batch: int) -> slice:
        """This rank's part of a global batch."""
        return rank_slice(batch, self.world.rank, self.world.size)

    def mine_of_chunks(self, batch: int, chunk: int) -> Tensor:
        """int64 (batch / size,): this rank's part of every chunk of a global batch, chunk by chunk.

        Each chunk's images are so the same for any number of ranks, and with them its batch-norm statistics.
        """
        part = self.mine(chunk)
        return torch.arange(batch).view(-1, chunk)[:, part].flatten()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def prepare(self, model: Network) -> Network:
        """`model` on the device, channels_last, with batch norm over the global batch and compiled where that is asked
        for."""
        model = model.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = self.world.synchronise_batch_norm(model) if self.sync_bn else model
        if self.compile:
            model.compile(dynamic=False)  # in place: names of weights stay; a stage has a handful of batch shapes
        return model


class Meter:
    """Mean loss and throughput of an epoch. Sums stay on the device; only `metrics` waits for it."""

    def __init__(self, stage: str, epoch: int, epochs: int, world: World, tick: Callable[..., None]):
        self._where, self._world, self._tick = (stage, epoch, epochs), world, tick
        self._sums: dict[str, Tensor] = {}
        self._images = self._steps = 0
        self._start = time.perf_counter()

    def steps(self, items: Iterable[Step], total: int) -> Iterator[Step]:
        """`items`, with a tick after each."""
        for step, item in enumerate(items, start=1):
            yield item
            self._tick(*self._where, step, total)

    def add(self, images: int, **losses: Tensor) -> None:
        """Note one step: how many images the whole world processed, and this rank's losses."""
        self._images += images
        self._steps += 1
        for name, loss in losses.items():
            value = loss.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def metrics(self, **more: float) -> dict[str, float]:
        """The epoch's means over steps and ranks.

        Raises:
            UserError: a loss is not finite.
        """
        names = sorted(self._sums)
        means = self._world.mean(torch.stack([self._sums[n] for n in names]) / self._steps).tolist()
        stage, epoch, _ = self._where
        for name, value in zip(names, means, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value}",
                    where=f"{stage}, epoch {epoch}",
                    fix=f"lower {stage}.lr, or use --compute.precision fp32; the last epoch's checkpoint is kept",
                )
        time_s = time.perf_counter() - self._start
        return {
            **dict(zip(names, means, strict=True)),
            **more,
            "images_per_s": self._images / time_s,
            "time_s": time_s,
        }
