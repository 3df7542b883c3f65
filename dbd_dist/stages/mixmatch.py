"""Stage 3: semi-supervised fine-tuning of the whole network (MixMatch, Berthelot et al. 2019, arXiv 1905.02249)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import Draw, cycling_batches, labelled_batches
from dbd_dist.distributed.world import World
from dbd_dist.fields import require
from dbd_dist.losses import probability_mse, sharpen, soft_cross_entropy
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.cuda_graph import CUDAGraphedStep
from dbd_dist.stages.epoch_loop import EpochLoop, fitting, restore, run_epochs
from dbd_dist.stages.split import ADDED, SampleLoss, Split, find_left_out, find_marked, measure_scores, split
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes, check_batch, find_stage


@dataclass(frozen=True, kw_only=True)
class MixMatch(Stage):
    """Stage 3: fine-tune everything on the kept labels and the unlabelled rest (Berthelot et al. 2019)."""

    name: ClassVar[str] = "mixmatch"
    title: ClassVar[str] = "Semi-supervised fine-tuning"
    reads: ClassVar[tuple[str, ...]] = ("model", "optimizer", "sample_loss", "split_rule")
    gives: ClassVar[tuple[str, ...]] = ("model", "split")
    evaluates: ClassVar[bool] = True

    epochs: int = 190
    """The split is renewed before every epoch."""
    steps: int = 1024
    """Steps an epoch."""
    batch: int = 64
    """Labelled images a step over all workers; as many unlabelled ones, in two views each."""
    lr: float = 0.002
    """Learning rate of Adam."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """constant as in the released recipe; cosine anneals over all epochs."""
    continue_optimizer: bool = True
    """Go on with the Adam state of the warm-up, as the released code does."""
    temperature: float = 0.5
    """Sharpening temperature of guessed labels."""
    mix_alpha: float = 0.75
    """Mixing weights are drawn from Beta(mix_alpha, mix_alpha), one a step."""
    lambda_u: float = 15.0
    """Weight of the unlabelled loss at the end of its ramp."""
    ramp_epochs: int | None = None
    """Epochs over which lambda_u grows linearly from 0; `epochs` unless given. Counts MixMatch epochs only."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)
    refresh: int = field(default=1, metadata={"omit_default": True})
    """Epochs between two splits."""
    withhold: float = field(default=0.0, metadata={"omit_default": True})
    """Share of the samples, drawn with the seed, whose labels this stage never trains on, whatever the split says: how
    the model agrees with them can be measured without knowing the truth (`dbd tune --truth none`)."""
    ema: float = field(default=0.0, metadata=ADDED)
    """Decay a step of an average of the weights, which then makes the splits, is measured and is the result; 0 is none
    (mean teacher, Tarvainen and Valpola 2017, arXiv 1703.01780)."""
    draw: Draw = field(default="uniform", metadata=ADDED)
    """How labelled images are drawn. uniform: each as often as any other. balanced: each class as often as any other,
    so that one whose labels are mostly doubted is not forgotten."""

    def __post_init__(self):
        require(
            self, "mixmatch", epochs=">= 1", steps=">= 1", batch=">= 2", lr="> 0", temperature="> 0", mix_alpha="> 0",
            lambda_u=">= 0", ramp_epochs=">= 1", refresh=">= 1", withhold="in [0, 1)", ema="in [0, 1)",
        )  # fmt: skip

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier("mixmatch", "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        optimizer = inputs["optimizer"] if self.continue_optimizer else None
        result, split = fine_tune(self, inputs["split_rule"], inputs["sample_loss"], model, optimizer, context, resume)
        return {"model": result.state_dict(), "split": split}

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        self.check_image_px(image_px)
        least, most = (0.5, 0.5) if (split := find_stage(others, Split)) is None else split.bounds()
        left_out = 0.0 if split is None else split.leave_out
        limit = min(round(least * images), round((1 - left_out - most) * images))
        check_batch(self.name, self.batch, workers, limit, "samples on the smaller side of the split")

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        copies = 4 if self.ema else 3
        return StageBytes(
            checkpoint=copies * networks.classifier + networks.split, kept=networks.classifier + networks.split
        )


def fine_tune(
    config: MixMatch,
    split_rule: Split,
    sample_loss: SampleLoss,
    model: Classifier,
    warmup_optimizer: dict[str, Any] | None,
    context: Context,
    resume: dict[str, Any] | None,
) -> tuple[Classifier, dict[str, Tensor]]:
    """Train `model` in place; the split is renewed before every epoch.

    Args:
        sample_loss: what samples are ranked by.
        warmup_optimizer: the state of the warm-up's Adam, to continue with; None starts afresh.
        resume: the state of an earlier epoch.

    Returns:
        The model to use (`model`, or its average), and the split: "loss", "kept" of the last epoch and "first_loss",
        "first_kept" of the first, each (N,).
    """
    optimizer = optim.adam(model.parameters(), config.lr)
    if warmup_optimizer:
        optimizer.load_state_dict(warmup_optimizer)
    restore(resume, model, optimizer)
    average = None
    if config.ema:
        average = optim.WeightAverage(model, config.ema)
    judge = model if average is None else average.model
    split_state: dict[str, Tensor] = {}
    if resume:
        with fitting():
            if average is not None:
                average.model.load_state_dict(resume["average"])
            split_state = dict(resume["split"])
            split_state["kept"] = split_state["kept"].view(len(context.images)).bool()  # of as many samples
    backward = make_backward(config, model, context)
    taught = ~withheld(config.withhold, len(context.images), context.generator("mixmatch", "withheld"))

    def one(epoch: int, loop: EpochLoop) -> None:
        nonlocal split_state
        if loop.done == 0 and (epoch - 1) % config.refresh == 0:  # else the checkpoint holds this epoch's
            early = epoch <= split_rule.leave_out_until * config.epochs
            split_state = renew(split_state, split_rule, sample_loss, judge, context, epoch, leave_out=early)
        kept = split_state["kept"] & taught
        others = ~kept & ~without(split_state, len(kept))
        train_epoch(config, model, backward, optimizer, context, epoch, (kept, others), loop, average)

    def more() -> dict[str, Any]:
        return {"split": split_state} | ({} if average is None else {"average": average.model.state_dict()})

    run_epochs(config, model, optimizer, context, resume, one, more=more, kept=lambda: split_state["kept"], judge=judge)
    return judge, split_state


def withheld(share: float, count: int, generator: torch.Generator) -> Tensor:
    """bool (count,): exactly ``round(share * count)`` samples whose labels are not trained on."""
    chosen = torch.zeros(count, dtype=torch.bool)
    if share:
        chosen[torch.randperm(count, generator=generator)[: round(share * count)]] = True
    return chosen


def renew(
    split_state: dict[str, Tensor],
    split_rule: Split,
    sample_loss: SampleLoss,
    model: Classifier,
    context: Context,
    epoch: int,
    *,
    leave_out: bool = True,
) -> dict[str, Tensor]:
    """The split of an epoch, beside the first one of all; `leave_out`: are those left out that the rule leaves out?"""
    left_out = None
    if split_rule.leave_out and leave_out:
        left_out = split_state.get("left_out")
        if left_out is None:
            left_out = find_left_out(split_rule, sample_loss, model, context)
    marked = split_state.get("marked")
    if split_rule.scan and marked is None:
        marked = find_marked(context)
    rates = split_state.get("noise_rate")
    losses, rates = measure_scores(split_rule, sample_loss, model, context, epoch, rates, marked)
    added = {"left_out": left_out, "marked": marked, "noise_rate": rates}
    here = {name: value for name, value in added.items() if value is not None}
    kept = split(losses, context.images.labels, context.num_classes, split_rule, without(here, len(losses)))
    return here | {
        "loss": losses,
        "kept": kept,
        "first_loss": split_state.get("first_loss", losses),
        "first_kept": split_state.get("first_kept", kept),
    }


def without(split_state: Mapping[str, Tensor], count: int) -> Tensor:
    """bool (count,): the samples that training does without."""
    nobody = torch.zeros(count, dtype=torch.bool)
    return split_state.get("left_out", nobody) | split_state.get("marked", nobody)


class Backward(Protocol):
    """Forward and backward pass of one step: leaves the gradient of its loss in the parameters."""

    def __call__(
        self, views: tuple[Tensor, Tensor, Tensor], given_BK: Tensor, *, mix: float, order: Tensor, lambda_u: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `mixmatch_losses`."""
        ...


def make_backward(config: MixMatch, model: Classifier, context: Context) -> Backward:
    """The plain pass, or one that replays a recording of it."""
    network = context.world.data_parallel(model)

    def backward(views, given_BK, *, mix, order, lambda_u):
        model.zero_grad()
        with context.autocast():
            losses = mixmatch_losses(
                network, model, views, given_BK,
                temperature=config.temperature, mix=mix, order=order, lambda_u=lambda_u, world=context.world,
            )  # fmt: skip
        losses[0].backward()
        return losses

    return CUDAGraphedStep(backward, model) if context.cuda_graphs else backward


def train_epoch(
    config: MixMatch,
    model: Classifier,
    backward: Backward,
    optimizer: torch.optim.Optimizer,
    context: Context,
    epoch: int,
    parts: tuple[Tensor, Tensor],
    loop: EpochLoop,
    average: optim.WeightAverage[Classifier] | None = None,
) -> None:
    """`config.steps` steps on images with their labels and on others without: the two `parts`, bool (N,) each."""
    world, images = context.world, context.images
    mine = context.mine(config.batch)
    ramp_steps = (config.ramp_epochs or config.epochs) * config.steps
    positions = torch.arange(len(images))
    kept, others = (positions[part] for part in parts)
    in_turn, unlabelled_draws = (context.generator("mixmatch", epoch, name) for name in ("labelled", "unlabelled"))
    labelled = labelled_batches(config.draw, kept, images.labels, config.steps, config.batch, in_turn)
    unlabelled = cycling_batches(others, config.steps, config.batch, unlabelled_draws)
    mixing = context.generator("mixmatch", epoch, "mix", world.rank)
    mixes = _mixing_weights(config, context.generator("mixmatch", epoch, "lambda"))
    chosen = torch.cat([labelled[:, mine], unlabelled[:, mine]], dim=1)
    in_step = 3 * (mine.stop - mine.start)
    orders = torch.stack([torch.randperm(in_step, generator=mixing) for _ in range(config.steps)])
    # once an epoch: a copy in a step would wait for the device
    orders, answers = orders.to(world.device), labelled[:, mine].to(world.device)
    model.train()

    left = images.batches(chosen[loop.done :])
    for step, pixels in enumerate(loop.steps(left, config.steps), start=loop.done):
        height, width = pixels.shape[2:]
        params = [
            augment.draw(config.augment, config.batch, height=height, width=width, generator=loop.draws)[mine]
            for _ in range(3)
        ]
        # labelled images, then two views of the others, in one call: on a GPU launches cost more than the work
        sources = torch.cat([pixels, pixels[len(pixels) // 2 :]])
        sharp, first, second = augment.apply(config.augment, sources, augment.join(params)).chunk(3)
        given_BK = F.one_hot(images.labels[answers[step]], context.num_classes).float()
        loss, supervised, consistency = backward(
            (sharp, first, second),
            given_BK,
            mix=float(mixes[step]),
            order=orders[step],
            lambda_u=config.lambda_u * min(((epoch - 1) * config.steps + step) / ramp_steps, 1.0),
        )
        progress = (epoch - 1 + step / config.steps) / config.epochs
        optim.set_lr(optimizer, config.lr * (optim.cosine(progress) if config.lr_schedule == "cosine" else 1.0))
        optimizer.step()
        if average is not None:
            average.update(model)
        loop.add(2 * config.batch, loss=loss, loss_labelled=supervised, loss_unlabelled=consistency)


def mixmatch_losses(
    network: Callable[[Tensor], Tensor],
    model: Classifier,
    views: tuple[Tensor, Tensor, Tensor],
    given_BK: Tensor,
    *,
    temperature: float,
    mix: float | Tensor,
    order: Tensor,
    lambda_u: float | Tensor,
    world: World,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step's loss: (loss, labelled part, unlabelled part), scalars.

    Args:
        network: `model`, wrapped for data parallelism.
        views: labelled images and two views of the unlabelled ones, (B, 3, H, W) each.
        given_BK: one-hot labels.
        mix: lambda' = max(l, 1 - l) of eq. 10, one for the whole batch; a scalar, as lambda_u.
        order: int64 (3B,), who is mixed with whom.
    """
    labelled, first, second = views
    with torch.no_grad():  # in train mode, as the released code guesses
        logits_of_first, logits_of_second = world.forward_each(model, [first, second])
        guess = (F.softmax(logits_of_first.float(), dim=1) + F.softmax(logits_of_second.float(), dim=1)) / 2
        guess = sharpen(guess, temperature)
    inputs = torch.cat([labelled, first, second])
    targets = torch.cat([given_BK, guess, guess])
    mixed = torch.lerp(inputs[order], inputs, mix)
    targets = torch.lerp(targets[order], targets, mix)
    # three forwards, each over every third image, so that each carries labelled and unlabelled ones through batch norm
    logits = torch.empty_like(targets)
    parts = [mixed[part::3].contiguous(memory_format=torch.channels_last) for part in range(3)]
    for part, logits_of_part in enumerate(world.forward_each(network, parts)):
        logits[part::3] = logits_of_part.float()
    count = len(labelled)
    supervised = soft_cross_entropy(logits[:count], targets[:count])
    consistency = probability_mse(logits[count:], targets[count:])
    return supervised + lambda_u * consistency, supervised, consistency


def _mixing_weights(config: MixMatch, generator: torch.Generator) -> np.ndarray:
    """lambda' for every step of an epoch, the same on all ranks."""
    seed = int(torch.randint(2**62, (), generator=generator))
    drawn = np.random.default_rng(seed).beta(config.mix_alpha, config.mix_alpha, size=config.steps)
    return np.maximum(drawn, 1 - drawn)
