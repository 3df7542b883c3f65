"""Differentially private SGD, by Opacus (an optional extra: ``pip install 'dbd-dist[dpsgd]'``)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.fields import require
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.group_norm import has_batch_norm
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.private import private_optimizer
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes, find_stage
from dbd_dist.stages.supervised import Supervised


@dataclass(frozen=True, kw_only=True)
class DPSGD(Stage):
    """SGD on gradients that are clipped image by image and noised (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

    In float32, since clipping needs exact norms. No source at hand states the clipping bound and the noise that were
    used against backdoors; these, and the learning rate, are ours, chosen on the digits.
    """

    name: ClassVar[str] = "dpsgd"
    title: ClassVar[str] = "DPSGD"
    gives: ClassVar[tuple[str, ...]] = ("model", "measures")
    evaluates: ClassVar[bool] = True

    epochs: int = 200
    """Passes over the data set in expectation."""
    batch: int = 128
    """Expected images a step over all workers: each image is part of a step with probability batch / images."""
    lr: float = 0.5
    """Peak learning rate of SGD; a cosine to zero over all epochs."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 1.0
    """Largest norm of an image's gradient; longer ones are scaled down to it."""
    noise: float = 0.1
    """Standard deviation of the noise on a step's sum of gradients, in units of `clip`."""
    delta: float = 1e-5
    """Of the guarantee (epsilon, delta) that result.json states."""
    chunk: int | None = None
    """Images of a worker whose gradients are held at a time, for less memory. Default: its part of the step."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, self.name, epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0",
            clip="> 0", noise="> 0", delta="in (0, 1)", chunk=">= 1",
        )  # fmt: skip

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        """Epochs, batch and augmentation of plain training."""
        plain = find_stage(tuple(stages.values()), Supervised)
        if plain is None:
            return None
        return replace(cls(), epochs=plain.epochs, batch=plain.batch, augment=plain.augment)

    def check_network(self, model: ModelConfig) -> None:
        if importlib.util.find_spec("opacus") is None:
            raise UserError("Opacus is not installed", where="--method dpsgd", hint="pip install 'dbd-dist[dpsgd]'")
        with torch.device("meta"):
            mixes = has_batch_norm(model.build_backbone())
        if mixes:
            raise UserError(
                "DPSGD clips the gradient of each image alone, and batch norm makes it depend on the others",
                where="model.norm",
                expected="group",
            )

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.prepare(context.classifier(self.name, "weights"), compiled=False)
        train(self, model, context, resume)
        return {"model": model.state_dict(), "measures": self.privacy(len(context.images))}

    def privacy(self, images: int) -> dict[str, float]:
        """The guarantee after all epochs, by the moments accountant (Renyi differential privacy, Mironov et al. 2019,
        arXiv 1908.10530)."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(self.noise, self.batch / images, self.epochs * (images // self.batch))]
        with warnings.catch_warnings():  # of orders that would give a tighter bound where there is next to no noise
            warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
            return {"epsilon": float(accountant.get_epsilon(self.delta)), "delta": self.delta}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def train(config: DPSGD, model: Classifier, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place."""
    world, images = context.world, context.images
    sgd = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    network, optimizer = private_optimizer(
        model, sgd, world, clip=config.clip, noise=config.noise, expected_batch=config.batch
    )
    restore(resume, model, optimizer)
    steps = len(images) // config.batch

    def one(epoch: int, loop: EpochLoop) -> None:
        draw = context.generator(config.name, epoch, "order")
        order, taken, longest = poisson_batches(len(images), config.batch, steps, draw, multiple=world.size)
        seeds = torch.randint(2**62, (steps,), generator=context.generator(config.name, epoch, "noise")).tolist()
        mine = context.mine(order.shape[1])
        rows = torch.arange(order.shape[1]).clamp(max=longest - 1)[mine]  # draws for as many images on any ranks
        chosen = order[:, mine]
        here, counts = chosen.to(world.device), taken[:, mine].float().to(world.device)
        network.train()
        for step, pixels in enumerate(loop.steps(images.batches(chosen[loop.done :]), steps), start=loop.done):
            height, width = pixels.shape[2:]
            params = augment.draw(config.augment, longest, height=height, width=width, generator=loop.draws)
            views = augment.apply(config.augment, pixels, params[rows])
            optimizer.seed(seeds[step])
            optim.set_lr(optimizer, config.lr * optim.cosine((epoch - 1 + step / steps) / config.epochs))
            total = torch.zeros((), device=world.device)
            parts = range(0, len(views), config.chunk or len(views))
            for start in parts:
                part = slice(start, start + (config.chunk or len(views)))
                losses = F.cross_entropy(network(views[part]), images.labels[here[step, part]], reduction="none")
                loss = (losses * counts[step, part]).sum()
                loss.backward()
                optimizer.signal_skip_step(do_skip=start != parts[-1])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach()
            loop.add(config.batch, loss=total * world.size / config.batch)

    run_epochs(config, model, optimizer, context, resume, one)


def poisson_batches(
    count: int, batch: int, steps: int, generator: torch.Generator, *, multiple: int
) -> tuple[Tensor, Tensor, int]:
    """Batches that each image is part of with probability batch / count, independently, as the guarantee assumes.

    Args:
        multiple: what the length of a batch has to be divided by.

    Returns:
        int64 (steps, L), positions; bool (steps, L), False where a place is empty (and the position 0); and how many
        images the longest batch has. L does not depend on `multiple` but for rounding up.
    """
    drawn = [(torch.rand(count, generator=generator) < batch / count).nonzero().flatten() for _ in range(steps)]
    longest = max(1, *(len(positions) for positions in drawn))
    length = -(-longest // multiple) * multiple
    order = torch.zeros(steps, length, dtype=torch.int64)
    taken = torch.zeros(steps, length, dtype=torch.bool)
    for step, positions in enumerate(drawn):
        order[step, : len(positions)] = positions
        taken[step, : len(positions)] = True
    return order, taken, longest
