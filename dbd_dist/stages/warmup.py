"""Stage 2: a linear head on the frozen backbone, trained on all given labels with symmetric cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.losses import symmetric_cross_entropy
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.split import SampleLoss
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes


@dataclass(frozen=True, kw_only=True)
class Warmup(Stage):
    """Stage 2: a linear head on the frozen backbone, trained on all given labels with a loss that is robust to
    noise."""

    name: ClassVar[str] = "warmup"
    title: ClassVar[str] = "Head warm-up"
    reads: ClassVar[tuple[str, ...]] = ("backbone",)
    gives: ClassVar[tuple[str, ...]] = ("model", "optimizer", "sample_loss")
    evaluates: ClassVar[bool] = True  # backdoors have been seen to enter here
    kept_when_last: ClassVar[bool] = True

    epochs: int = 10
    batch: int = 128
    """Images a step over all workers."""
    lr: float = 0.002
    """Learning rate of Adam."""
    loss: Literal["sce", "ce"] = "sce"
    """Symmetric cross-entropy (DBD), or plain cross-entropy (the article's ablation)."""
    sce_alpha: float = 0.1
    """Weight of cross-entropy in SCE."""
    sce_beta: float = 1.0
    """Weight of reverse cross-entropy in SCE. Adam does not see the scale of both weights, only their ratio."""
    sce_clamp: float = field(default=1e-4, metadata={"omit_default": True})
    """What stands for a probability of 0 in the given label, whose logarithm reverse cross-entropy needs."""
    freeze_batch_norm: bool = True
    """Keep the frozen backbone's batch-norm statistics; False lets them drift, as the released code does."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, "warmup", epochs=">= 1", batch=">= 2", lr="> 0", sce_alpha=">= 0", sce_beta=">= 0",
                sce_clamp="in (0, 1)")  # fmt: skip
        if self.sce_alpha == 0 and self.sce_beta == 0:
            raise UserError("both weights are 0, which leaves no loss", where="warmup.sce_alpha, warmup.sce_beta")

    def offers(self) -> dict[str, Any]:
        return {"sample_loss": partial(sample_losses, self)}

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier("warmup", "weights")
        model.backbone.load_state_dict(self.backbone(inputs))
        model = context.prepare(model)
        optimizer = train_head(self, model, context, resume)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def backbone(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights that are frozen."""
        return inputs["backbone"]

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        # Adam holds two values a parameter beside the weights, here of the head alone
        warm = networks.classifier + 2 * networks.head
        return StageBytes(checkpoint=warm, kept=warm)


def sample_losses(config: Warmup, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The loss of each sample (B,): what the head is trained with, and what the split ranks by."""
    if config.loss == "ce":
        return F.cross_entropy(logits_BK.float(), labels_B, reduction="none")
    return symmetric_cross_entropy(logits_BK, labels_B, config.sce_alpha, config.sce_beta, config.sce_clamp)


@dataclass(frozen=True, kw_only=True)
class SupervisedWarmup(Warmup):
    """Stage 2 on the backbone of a classifier that was trained with labels (the article's ablation)."""

    reads: ClassVar[tuple[str, ...]] = ("model",)

    def backbone(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        prefix = "backbone."
        return {n.removeprefix(prefix): value for n, value in inputs["model"].items() if n.startswith(prefix)}


def train_head(
    config: Warmup, model: Classifier, context: Context, resume: dict[str, Any] | None
) -> torch.optim.Optimizer:
    """`fit_head` with the warm-up's own loss, on all samples."""
    loss = partial(sample_losses, config)
    return fit_head(config, model, context, resume, sample_loss=loss, freeze_batch_norm=config.freeze_batch_norm)


class HeadConfig(Protocol):
    """What `fit_head` needs of a stage."""

    name: ClassVar[str]

    @property
    def epochs(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def augment(self) -> AugmentConfig: ...


def fit_head(
    config: HeadConfig,
    model: Classifier,
    context: Context,
    resume: dict[str, Any] | None,
    *,
    sample_loss: SampleLoss,
    freeze_batch_norm: bool = True,
    among: Tensor | None = None,
    more: Callable[[], dict[str, Any]] = dict,
) -> torch.optim.Optimizer:
    """Train the head of `model` in place; its backbone does not change.

    Args:
        sample_loss: its mean over a batch is the loss.
        freeze_batch_norm: see `Warmup`.
        among: int64 (n,), the samples to train on; default all.
        more: see `run_epochs`.

    Returns:
        The optimiser. It holds all parameters, so that MixMatch can continue with it; those of the backbone have no
        state yet.
    """
    world, images = context.world, context.images
    optimizer = optim.adam(model.parameters(), config.lr)
    restore(resume, model, optimizer)
    model.backbone.requires_grad_(False)
    head = world.data_parallel(model.head)
    head.train()
    model.backbone.train(not freeze_batch_norm)
    mine = context.mine(config.batch)

    def one(epoch: int, loop: EpochLoop) -> None:
        count = len(images) if among is None else len(among)
        order = epoch_batches(count, config.batch, context.generator(config.name, epoch, "order"))
        order = order if among is None else among[order]
        chosen = order[loop.done :, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        # the loop first: `zip` looks into what comes first once more, and so ends its last step
        for pixels, positions in zip(loop.steps(images.batches(chosen), len(order)), here):
            params = augment.draw(
                config.augment, config.batch, height=pixels.shape[2], width=pixels.shape[3], generator=loop.draws
            )
            labels = images.labels[positions]
            with context.autocast():
                with torch.no_grad():
                    features = model.backbone(augment.apply(config.augment, pixels, params[mine]))
                logits = head(features)
            loss = sample_loss(logits, labels).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.add(config.batch, loss=loss)

    run_epochs(config, model, optimizer, context, resume, one, more=more)
    model.backbone.requires_grad_(True)
    return optimizer
