"""The epoch loop that all stages share: random draws, position, mean losses, throughput, and what is reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist.stages.context import Context, EpochEnd, StepEnd

Step = TypeVar("Step")


class Diverged(UserError):
    """A loss is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a stage resumes: after whole epochs, or after some steps of the next one."""

    epoch: int = 0
    """Epochs that are over."""
    step: int = 0
    """Steps of the next epoch that are over."""
    loop: dict[str, Any] | None = None
    """What the epoch under way has summed up and drawn."""

    @classmethod
    def of(cls, resume: dict[str, Any] | None) -> Position:
        if not resume:
            return cls()
        return cls(epoch=resume["epoch"], step=resume.get("step", 0), loop=resume.get("meter"))


class EpochLoop:
    """An epoch under way: its random draws, how far it is, mean losses and throughput. Sums stay on the device; only
    `metrics` and states wait for it.

    Args:
        state: the stage's own part of a state, to resume after the last step.
        start: where the stage resumes; counts if it lies inside this epoch.
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
        if start is not None and start.loop is not None and start.epoch == epoch - 1:
            self._restore(start.step, start.loop)
        self._start = time.perf_counter()

    def _restore(self, step: int, meter: dict[str, Any]) -> None:
        device = self._context.world.device
        self.done = self._from = step
        with fitting():
            self.draws.set_state(meter["draws"])
            # sums are a rank's own; another number of ranks shares them out anew, with the same mean
            sums, size = meter["sums"], self._context.world.size
            mine = [s[self._context.world.rank] if len(s) == size else s.mean() for s in sums.values()]
            self._sums = {name: value.to(device) for name, value in zip(sums, mine)}
            self._images, self._before_s = int(meter["images"]), float(meter["time_s"])

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
            hint=f"lower {stage}.lr, or use --compute.precision fp32",
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


class Trained(Protocol):
    """What `run_epochs` needs of a stage."""

    name: ClassVar[str]

    @property
    def epochs(self) -> int: ...


@contextmanager
def fitting() -> Iterator[None]:
    """Load a state in the body: whoever can write a checkpoint can write its hash and key too.

    Raises:
        UserError: it is not what the stage saves.
    """
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            "the checkpoint to resume from does not fit its stage",
            where="checkpoints",
            hint="delete the newest file in that folder of the run: the one before it is taken",
        ) from error


def restore(resume: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what `run_epochs` saves of both.

    Raises:
        UserError: as `fitting`.
    """
    if resume:
        with fitting():
            model.load_state_dict(resume["model"])
            optimizer.load_state_dict(resume["optimizer"])


def run_epochs(
    stage: Trained,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Context,
    resume: dict[str, Any] | None,
    train_epoch: Callable[[int, EpochLoop], None],
    *,
    more: Callable[[], dict[str, Any]] = dict,
    kept: Callable[[], Tensor | None] = lambda: None,
    judge: nn.Module | None = None,
) -> None:
    """Call `train_epoch` (epoch, counted from 1; its loop) for every epoch that is left, and report each.

    Args:
        more: what a state holds besides model, optimizer and position.
        kept: the split in force, bool (N,), where there is one.
        judge: the model to measure, where it is not `model`.
    """
    start = Position.of(resume)

    def state() -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more()}

    for epoch in range(start.epoch + 1, stage.epochs + 1):
        loop = EpochLoop(stage.name, epoch, stage.epochs, context, state=state, start=start)
        train_epoch(epoch, loop)
        context.report(
            EpochEnd(
                stage=stage.name,
                epoch=epoch,
                epochs=stage.epochs,
                metrics=loop.metrics(lr=optimizer.param_groups[0]["lr"]),
                state=lambda epoch=epoch: {**state(), "epoch": epoch},
                model=model if judge is None else judge,
                kept=kept(),
            )
        )
