"""What every stage is given, and what it hands back after each epoch."""

from __future__ import annotations

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

FORMS = 64
"""That torch.compile may make of the networks of a process."""


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
class StepEnd:
    """A step inside an epoch is over."""

    stage: str
    epoch: int
    epochs: int
    step: int
    """Counts from 1."""
    steps: int
    state: Callable[[], dict[str, Any]]
    """As in `EpochEnd`, to go on after this step. Waits for the device."""


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
    after_step: Callable[[StepEnd], None] = field(default=lambda _: None)
    """Called after every step but an epoch's last, on every rank; may save a state, and may end the run."""

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
            allow_forms()
            model.compile(dynamic=False)  # in place: names of weights stay; a stage has a handful of batch shapes
        return model


def allow_forms() -> None:
    """Let torch.compile keep as many forms of the networks as the runs of a process have.

    Each stage has one for every shape of batch, with and without gradient, in train and in eval mode, and all networks
    count as one function: beyond torch's limit of 8 the rest would run uncompiled.
    """
    import torch._dynamo.config as dynamo  # takes seconds, where nothing is compiled too

    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)


class Diverged(UserError):
    """A loss is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stage goes on: after whole epochs, or after some steps of the next one."""

    epoch: int = 0
    """Epochs that are over."""
    step: int = 0
    """Steps of the next epoch that are over."""
    meter: dict[str, Any] | None = None
    """What the epoch under way has summed up and drawn."""

    @classmethod
    def of(cls, resume: dict[str, Any] | None) -> Position:
        if not resume:
            return cls()
        return cls(epoch=resume["epoch"], step=resume.get("step", 0), meter=resume.get("meter"))


class Meter:
    """An epoch under way: its random draws, how far it is, mean losses and throughput. Sums stay on the device; only
    `metrics` and states wait for it.

    Args:
        state: the stage's own part of a state, to go on after the last step.
        start: where the stage goes on; counts if it lies inside this epoch.
    """

    def __init__(
        self,
        stage: str,
        epoch: int,
        epochs: int,
        context: Context,
        *,
        state: Callable[[], dict[str, Any]] = dict,
        start: Position | None = None,
    ):
        self._where, self._context, self._state = (stage, epoch, epochs), context, state
        self.draws = context.generator(stage, epoch, "augment")
        """What the epoch's augmentation is drawn from."""
        self.done = 0
        """Steps that are over."""
        self._from = 0
        self._sums: dict[str, Tensor] = {}
        self._images, self._before_s = 0, 0.0
        self._finite, self._good = (torch.ones((), dtype=torch.int64, device=context.world.device) for _ in range(2))
        """Whether all losses so far were finite, and how many were before one was not, plus 1."""
        self._total = 0
        if start is not None and start.meter is not None and start.epoch == epoch - 1:
            self._restore(start.step, start.meter)
        self._start = time.perf_counter()

    def _restore(self, step: int, meter: dict[str, Any]) -> None:
        device = self._context.world.device
        self.done = self._from = step
        self.draws.set_state(meter["draws"])
        # sums are a rank's own; another number of ranks shares them out anew, with the same mean
        sums, size = meter["sums"], self._context.world.size
        mine = [s[self._context.world.rank] if len(s) == size else s.mean() for s in sums.values()]
        self._sums = {name: value.to(device) for name, value in zip(sums, mine)}
        self._images, self._before_s = meter["images"], meter["time_s"]

    def steps(self, items: Iterable[Step], total: int) -> Iterator[Step]:
        """`items`, which belong to the steps that are left of `total`, with a tick and a chance to stop after each."""
        self._total = total
        for item in items:
            yield item
            self.done += 1
            self._context.tick(*self._where, self.done, total)
            if self.done < total:
                stage, epoch, epochs = self._where
                self._context.after_step(
                    StepEnd(stage=stage, epoch=epoch, epochs=epochs, step=self.done, steps=total, state=self._here)
                )

    def add(self, images: int, **losses: Tensor) -> None:
        """Note one step: how many images the whole world processed, and this rank's losses, the whole one first."""
        self._images += images
        for name, loss in losses.items():
            value = loss.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        total = next(iter(losses.values())).detach()
        self._finite *= total - total == 0  # false of inf and nan; few launches, and nothing to wait for
        self._good += self._finite

    def _here(self) -> dict[str, Any]:
        """The stage's state inside this epoch; every rank has to ask for it."""
        self._check()
        sums = {name: self._context.world.gather(value.view(1)).cpu() for name, value in self._sums.items()}
        return {
            **self._state(),
            "epoch": self._where[1] - 1,
            "step": self.done,
            "meter": {
                "sums": sums,
                "draws": self.draws.get_state(),
                "images": self._images,
                "time_s": self._before_s + time.perf_counter() - self._start,
            },
        }

    def _check(self) -> None:
        begun = self.done - self._from
        first = int(self._context.world.gather(self._good.view(1)).min())  # counted from 1
        if first > begun:
            return
        stage, epoch, _ = self._where
        raise Diverged(
            "the loss is not a finite number",
            where=f"{stage}, epoch {epoch}, step {self._from + first} of {self._total}",
            fix=f"lower {stage}.lr, or use --compute.precision fp32",
        )

    def metrics(self, **more: float) -> dict[str, float]:
        """The epoch's means over steps and ranks.

        Raises:
            Diverged: a loss was not finite; names the first step with one.
        """
        self._check()
        world = self._context.world
        names = sorted(self._sums)
        means = world.mean(torch.stack([self._sums[n] for n in names]) / self.done).tolist()
        time_s = self._before_s + time.perf_counter() - self._start
        return {
            **dict(zip(names, means, strict=True)),
            **more,
            "images_per_s": self._images / time_s,
            "time_s": time_s,
        }
