"""Stage 1: self-supervised learning of the backbone (SimCLR, Chen et al. 2020, arXiv 2002.05709). Labels are not
touched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.losses import nt_xent
from dbd_dist.models.heads import ContrastiveModel
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.split import ADDED
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes

Network = Callable[[Tensor], Tensor]
LossOf = Callable[[Tensor, Tensor], Tensor]
"""(projections of the first views, of the second) -> the loss of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class SimCLR(Stage):
    """Stage 1: learn the backbone without labels (Chen et al. 2020). Defaults: CIFAR-10 as DBD's authors configure
    it."""

    name: ClassVar[str] = "simclr"
    title: ClassVar[str] = "Self-supervised pretraining"
    gives: ClassVar[tuple[str, ...]] = ("backbone",)

    epochs: int = 1000
    """Epochs to train; 0 takes the weights of --model.weights as they are."""
    schedule_epochs: int | None = None
    """Length of the cosine schedule; `epochs` unless given. The released recipe stops a 1000-epoch schedule at 100."""
    batch: int = 512
    """Images a step over all workers; each gives two views."""
    chunk: int | None = None
    """Images a forward pass over all workers, for batches that do not fit in memory: the loss is still that of the
    whole batch, batch norm sees one chunk at a time, and the forward pass is computed twice. Default: the batch at
    once."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """lars: SGD with a rate of its own for each layer (You et al. 2017), for batches of some thousands."""
    lr: float = 0.4
    """Peak learning rate."""
    warmup_epochs: int = 0
    """Epochs of linear learning-rate warm-up (none in the released recipe)."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 0.5
    """Temperature of NT-Xent."""
    symmetric: bool = True
    """Anchors from both views, as in SimCLR's paper; the released code of DBD takes the first view only."""
    augment: AugmentConfig = field(default_factory=augment.simclr)
    """How a view is made."""
    overlay: float = field(default=0.0, metadata=ADDED)
    """Largest share of another image that shines through each view; 0 is none. Features that are to agree whatever
    lies over an image learn not to look at a trigger that does (`overlay_views`)."""

    def __post_init__(self):
        require(
            self, "simclr", epochs=">= 0", schedule_epochs=">= 1", batch=">= 2", lr="> 0", warmup_epochs=">= 0",
            momentum="in [0, 1)", weight_decay=">= 0", temperature="> 0",
            overlay="in [0, 1)",
        )  # fmt: skip
        if self.chunk is not None and (self.chunk < 2 or self.batch % self.chunk):
            raise UserError(
                f"a batch of {self.batch} does not divide into chunks of {self.chunk}",
                where="simclr.chunk",
                expected="a divisor of simclr.batch from 2",
            )
        if self.schedule_epochs is not None and self.schedule_epochs < self.epochs:
            raise UserError(
                f"the schedule of {self.schedule_epochs} epochs ends before the {self.epochs} epochs of training",
                where="simclr.schedule_epochs",
                expected=f"at least simclr.epochs = {self.epochs}",
            )

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.prepare(context.contrastive("simclr", "weights"))
        pretrain(self, model, context, resume)
        return {"backbone": model.backbone.state_dict()}

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        super().check(images, image_px, workers, others)
        if self.chunk is not None and self.chunk % workers:
            raise UserError(
                f"chunks of {self.chunk} cannot be shared equally by {workers} workers",
                where="simclr.chunk",
                expected=f"a multiple of {workers}",
            )

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        # SGD and LARS hold one value a parameter beside the weights
        return StageBytes(checkpoint=2 * networks.contrastive, kept=networks.backbone)


def pretrain(config: SimCLR, model: ContrastiveModel, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place, from scratch or from the `resume` state of an earlier epoch."""
    optimizer = make_optimizer(config, model)
    restore(resume, model, optimizer)
    network = context.world.data_parallel(model)

    def one(epoch: int, loop: EpochLoop) -> None:
        train_epoch(config, model, network, optimizer, context, epoch, loop)

    run_epochs(config, model, optimizer, context, resume, one)


def make_optimizer(config: SimCLR, model: nn.Module) -> torch.optim.Optimizer:
    make = {"sgd": optim.sgd, "lars": optim.Lars}[config.optimizer]
    return make(model.parameters(), config.lr, config.momentum, config.weight_decay)


def train_epoch(
    config: SimCLR,
    model: nn.Module,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Context,
    epoch: int,
    loop: EpochLoop,
) -> None:
    """One pass over the images; `network` is `model`, wrapped for data parallelism."""
    world, images = context.world, context.images
    mine = context.mine(config.batch) if config.chunk is None else context.mine_of_chunks(config.batch, config.chunk)
    parts = 1 if config.chunk is None else config.batch // config.chunk
    schedule = config.schedule_epochs or config.epochs
    order = epoch_batches(len(images), config.batch, context.generator("simclr", epoch, "order"))
    network.train()

    def loss_of(z_first: Tensor, z_second: Tensor) -> Tensor:
        return nt_xent(z_first, z_second, config.temperature, world, symmetric=config.symmetric)

    left = images.batches(order[loop.done :, mine])
    for step, pixels in enumerate(loop.steps(left, len(order)), start=loop.done):
        height, width = pixels.shape[2:]
        both = [
            augment.draw(config.augment, config.batch, height=height, width=width, generator=loop.draws)[mine]
            for _ in range(2)
        ]
        # in one call: on a GPU the launches of two cost more than the work
        views = augment.apply(config.augment, torch.cat([pixels, pixels]), augment.join(both))
        if config.overlay:
            views = overlay_views(views, config.overlay, config.batch, mine, loop.draws)
        optimizer.zero_grad()
        if parts == 1:
            loss = backward(network, views, loss_of, context)
        else:
            loss = backward_in_chunks(model, network, views, parts, loss_of, context)
        progress = (epoch - 1 + step / len(order)) / schedule
        optim.set_lr(optimizer, config.lr * optim.cosine(progress, config.warmup_epochs / schedule))
        optimizer.step()
        loop.add(config.batch, loss=loss)


def overlay_views(views: Tensor, most: float, batch: int, mine: Any, draws: torch.Generator) -> Tensor:
    """Each view blended with a view of another image, whose share is drawn from 0 to `most`; what is to be learnt
    stays the image with the larger share (images that are mixed without mixing what is learnt: Shen et al. 2022,
    arXiv 2003.05438, mix two of a batch for SimCLR and MoCo).

    Args:
        views: (2B, 3, H, W), all first views, then all second; others are found within each half.
        batch: images a step over all workers.
        mine: which of them are this worker's.
        draws: the same on all workers. Other images are of the same worker.
    """
    shares = torch.rand(2, batch, generator=draws)[:, mine].flatten() * most
    here = len(views) // 2
    shifts = torch.randint(1, max(here, 2), (2,), generator=draws).tolist()
    others = torch.cat([half.roll(shift, dims=0) for half, shift in zip(views.chunk(2), shifts)])
    return torch.lerp(views, others, shares.to(views)[:, None, None, None])


def backward(network: Network, views: Tensor, loss_of: LossOf, context: Context) -> Tensor:
    """Add the gradient of the whole batch's loss to that of the parameters; returns the loss.

    Args:
        views: (2B, 3, H, W), all first views, then all second.
    """
    with context.autocast():
        projections = network(views)
    loss = loss_of(*projections.chunk(2))
    loss.backward()
    return loss


def backward_in_chunks(
    model: nn.Module, network: nn.Module, views: Tensor, parts: int, loss_of: LossOf, context: Context
) -> Tensor:
    """As `backward`, with the activations of a `parts`-th of the batch in memory at a time (Gao et al. 2021, arXiv
    2101.06983): project all chunks without gradient, take the gradient of the whole batch's loss with respect to the
    projections, then project each chunk again and send its part of that gradient back.

    Exact but for batch norm, whose statistics are those of a chunk: both views of its images, on all ranks.
    """
    chunks = [torch.cat(pair) for pair in zip(*(view.chunk(parts) for view in views.chunk(2)))]
    before = [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad(), context.autocast():
        projections = [model(chunk) for chunk in chunks]
    for buffer, value in zip(model.buffers(), before):  # running statistics move once a step, in the second pass
        buffer.copy_(value)
    leaves = [z.requires_grad_() for z in projections]
    loss = loss_of(*(torch.cat([leaf.chunk(2)[view] for leaf in leaves]) for view in range(2)))
    loss.backward()
    for i, (chunk, leaf) in enumerate(zip(chunks, leaves), start=1):
        with nullcontext() if i == parts else context.world.no_sync(network):
            with context.autocast():
                again = network(chunk)
            again.backward(leaf.grad)
    return loss
