"""Trigger inversion of Neural Cleanse: for every class the smallest patch that turns any image into it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import cycling_batches, rank_slice
from dbd_dist.fields import require
from dbd_dist.models.folded import folded
from dbd_dist.stages.context import Context, EpochEnd
from dbd_dist.stages.flagged import flag
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes

Classify = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) -> logits (B, K), in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Inversion(Stage):
    """Neural Cleanse (Wang et al., IEEE S&P 2019, sec. IV): a mask and a pattern for every class, all classes at once;
    a class whose mask is far smaller than those of the others is taken to be a target.

    Numbers are those of the authors' code where it has them: Adam 0.1 with betas 0.5 and 0.9, success 0.99, cost from
    1e-3 on, doubled, and divided by 2^1.5. Rounds are shorter here: 80 images of each class instead of 1,000. Always in
    float32: in bfloat16 the index of a target came out below 2 where float32 has it above (docs/speed.md).
    """

    name: ClassVar[str] = "inversion"
    title: ClassVar[str] = "Trigger inversion"
    reads: ClassVar[tuple[str, ...]] = ("model",)
    gives: ClassVar[tuple[str, ...]] = ("flagged", "triggers")
    on_clean: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    rounds: int = 100
    """At most; the cost is adapted after each."""
    steps: int = 10
    """Steps a round."""
    per_class: int = 8
    """Images a step, to each of which the trigger of every class is applied."""
    images: int = 512
    """Images a forward pass at most: with more classes than fit, they are inverted in groups."""
    lr: float = 0.1
    """Learning rate of Adam."""
    success: float = 0.99
    """Share of images that the trigger of a class has to turn into it."""
    cost: float = 1e-3
    """First weight of the mask's L1 norm in the loss, once the success is reached."""
    multiplier: float = 2.0
    """What the cost is multiplied by while the success holds, and, to the power of 1.5, divided by while it does
    not."""
    patience: int = 5
    """Rounds of the same outcome after which the cost changes; five times as many without a smaller mask end the
    inversion of a class."""
    anomaly: float = 2.0
    """Anomaly index above which a class is taken to be a target (paper: 2)."""

    def __post_init__(self):
        require(
            self, self.name, rounds=">= 1", steps=">= 1", per_class=">= 1", images=">= 1", lr="> 0",
            success="in (0, 1]", cost="> 0", multiplier="> 1", patience=">= 1", anomaly="> 0",
        )  # fmt: skip
        if self.images < self.per_class:
            raise UserError(
                f"{self.images} images a pass do not hold the {self.per_class} of one class",
                where=f"{self.name}.images",
                expected=f"at least {self.per_class}",
            )

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        if resume:
            return resume["found"]
        start = time.perf_counter()
        world, classes = context.world, context.num_classes
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model = model.to(world.device, memory_format=torch.channels_last).requires_grad_(False).eval()  # type: ignore[call-overload]
        classify = folded(model)
        order = cycling_batches(
            torch.arange(len(context.clean)), self.rounds * self.steps, self.per_class, context.generator(self.name)
        )
        mine = list(range(classes))[rank_slice(classes, world.rank, world.size)]
        size = max(self.images // self.per_class, 1)
        parts, done = [], 0
        for group in (mine[i : i + size] for i in range(0, len(mine), size)):
            starts = [start_of(context, label) for label in group]

            def tick(round: int, done: int = done) -> None:
                context.tick(self.name, 1, 1, done + round, self.rounds * -(-len(mine) // size))

            batches = context.clean.batches(order)
            parts.append(invert(self, classify, context.normalise, group, starts, batches, tick))
            done += self.rounds
        px = next(context.clean.batches(order[:1])).shape[-1]
        nothing = torch.empty(0, 4, px, px, device=world.device)
        found = world.gather(torch.cat([nothing, *parts])).cpu()  # in the order of the classes
        given = self._judge(found)
        time_s = time.perf_counter() - start
        context.report(
            EpochEnd(
                stage=self.name,
                epoch=1,
                epochs=1,
                metrics={"flagged_classes": float(len(given["flagged"]["classes"])), "time_s": time_s},
                state=lambda: {"epoch": 1, "found": given},
                model=model,
            )
        )
        return given

    def _judge(self, triggers: Tensor) -> dict[str, Any]:
        scores = anomaly_index(triggers[:, 0].sum(dim=(1, 2)))
        flagged = flag(classes=torch.nonzero(scores > self.anomaly).flatten(), class_scores=scores)
        return {"flagged": flagged, "triggers": triggers}

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        """Any number of clean images does."""

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=networks.split, kept=networks.split)


def anomaly_index(norms_K: Tensor) -> Tensor:
    """float32 (K,): how many deviations the L1 norm of each mask lies below the median, by the median absolute
    deviation times 1.4826 (sec. IV-B; the factor makes it a standard deviation for a normal distribution). 0 where
    masks do not differ."""
    norms = norms_K.double()
    median = norms.quantile(0.5)
    deviation = 1.4826 * (norms - median).abs().quantile(0.5)
    return ((median - norms) / deviation).float() if deviation > 0 else torch.zeros_like(norms_K, dtype=torch.float32)


def start_of(context: Context, label: int) -> Tensor:
    """What mask and pattern of a class start from, before tanh: float32 (4, H, W), the same for any grouping."""
    px = next(context.clean.batches([torch.zeros(1, dtype=torch.int64)])).shape[-1]
    drawn = torch.rand(4, px, px, generator=context.generator("inversion", label)) * 0.98 + 0.01
    return torch.atanh(2 * drawn - 1).to(context.world.device)


def invert(
    config: Inversion,
    classify: Classify,
    normalise: AugmentConfig,
    targets: Sequence[int],
    starts: Sequence[Tensor],
    batches: Iterable[Tensor],
    tick: Callable[[int], None] = lambda round: None,
) -> Tensor:
    """Find a trigger for each target class.

    Classes do not influence each other, which allows one pass for all: only the sum of their losses is derived, and
    Adam treats every pixel for itself. A class whose mask no longer shrinks leaves the batch.

    Args:
        starts: `start_of` each.
        batches: uint8 (b, 3, H, W), at least rounds * steps of them.
        tick: called after each round.

    Returns:
        float32 (A, 4, H, W) on the device: mask, then pattern as RGB, both in 0-1; of the smallest mask that held the
        success, or the last where none did.
    """
    device = starts[0].device
    raw = torch.stack(list(starts)).requires_grad_()
    best = (raw.detach().tanh() + 1) / 2
    optimizer = torch.optim.Adam([raw], config.lr, betas=(0.5, 0.9))
    schedule = CostSchedule(config, len(targets))
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (normalise.mean, normalise.std))
    source = iter(batches)
    for round in range(1, config.rounds + 1):
        active = schedule.active
        here, wanted = active.to(device), torch.tensor(targets)[active].to(device)
        cost = schedule.cost[active].to(device)
        hits = torch.zeros(len(active), device=device)
        for images in _take(source, config.steps):
            triggers = (raw[here].tanh() + 1) / 2
            stamped = stamp(images.float() / 255, triggers)
            logits = classify(((stamped - mean) / std).flatten(0, 1).contiguous(memory_format=torch.channels_last))
            labels = wanted.repeat_interleave(len(images))
            hits += (logits.detach().argmax(dim=1) == labels).view(len(here), -1).float().mean(dim=1)
            losses = F.cross_entropy(logits, labels, reduction="none").view(len(here), -1).mean(dim=1)
            optimizer.zero_grad()
            (losses + cost * triggers[:, 0].sum(dim=(1, 2))).sum().backward()
            optimizer.step()
        now = (raw.detach()[here].tanh() + 1) / 2
        smaller = schedule.update(hits.cpu() / config.steps, now[:, 0].sum(dim=(1, 2)).cpu())
        best[here[smaller.to(device)]] = now[smaller.to(device)]
        tick(round)
        if not len(schedule.active):
            break
    never = torch.isinf(schedule.best).to(device)
    best[never] = (raw.detach()[never].tanh() + 1) / 2
    return best


def _take(source: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield next(source)


def stamp(images_BCHW: Tensor, triggers_A4HW: Tensor) -> Tensor:
    """Images in 0-1 with each trigger: (A, B, 3, H, W), ``(1 - mask) * image + mask * pattern``."""
    mask, pattern = triggers_A4HW[:, None, :1], triggers_A4HW[:, None, 1:]
    return (1 - mask) * images_BCHW + mask * pattern


class CostSchedule:
    """The weight of the mask's norm, and when to stop, for many classes at once (the authors' code; the paper only says
    that it is adjusted so that more than 99 % of the images succeed)."""

    def __init__(self, config: Inversion, classes: int):
        self._config = config
        self.cost = torch.zeros(classes)
        """float32 (A,): 0 until the success is reached."""
        self.best = torch.full((classes,), torch.inf)
        """The smallest norm that held the success."""
        self.active = torch.arange(classes)
        """Classes that go on."""
        self._high, self._low, self._stale = (torch.zeros(classes, dtype=torch.int64) for _ in range(3))
        self._raised, self._lowered = (torch.zeros(classes, dtype=torch.bool) for _ in range(2))
        self._reference = self.best.clone()

    def update(self, success: Tensor, norms: Tensor) -> Tensor:
        """Note a round.

        Args:
            success, norms: of the active classes, in their order.

        Returns:
            bool, of the same: which have a smaller mask than any before that succeeded.
        """
        config, a = self._config, self.active
        holds = success >= config.success
        smaller = holds & (norms < self.best[a])
        self.best[a] = torch.where(smaller, norms, self.best[a])
        self._high[a] = torch.where(holds, self._high[a] + 1, 0)
        self._low[a] = torch.where(holds, 0, self._low[a] + 1)
        begun = self.cost[a] > 0
        up, down = self._high[a] >= config.patience, begun & (self._low[a] >= config.patience)
        raised = torch.where(begun, self.cost[a] * config.multiplier, config.cost)
        lowered = self.cost[a] / config.multiplier**1.5
        self.cost[a] = torch.where(up, raised, torch.where(down, lowered, self.cost[a]))
        self._high[a] = torch.where(up, 0, self._high[a])
        self._low[a] = torch.where(down, 0, self._low[a])
        self._raised[a] |= up & begun
        self._lowered[a] |= down
        better = self.best[a] < 0.99 * self._reference[a]
        self._stale[a] = torch.where(better, 0, self._stale[a] + 1)
        self._reference[a] = torch.where(better, self.best[a], self._reference[a])
        settled = self._raised[a] & self._lowered[a] & (self._stale[a] >= 5 * config.patience)
        self.active = a[~settled]
        return smaller
