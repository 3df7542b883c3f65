"""Universal adversarial training on the trusted images: what a trigger could do to any image is found and unlearnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import Draw, cycling_batches, labelled_batches, rank_slice
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.mixmatch import MixMatch
from dbd_dist.stages.split import ADDED, Split
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes, check_batch, find_stage

AT_A_TIME = 128
"""Images that are added up at a time, for their mean."""


@dataclass(frozen=True, kw_only=True)
class UniversalTraining(Stage):
    """Unlearning of triggers: in turn find perturbations that mislead the model on all images, and train it to see the
    images through them (universal adversarial training, Shafahi et al. 2020, arXiv 1811.11304, as a minimax game over
    trusted images like I-BAU, Zeng et al. 2022, arXiv 2110.03735, with the kept samples in the place of clean data)."""

    name: ClassVar[str] = "uat"
    title: ClassVar[str] = "Universal adversarial training"
    reads: ClassVar[tuple[str, ...]] = ("model", "split")
    gives: ClassVar[tuple[str, ...]] = ("model",)
    evaluates: ClassVar[bool] = True
    revision: ClassVar[int] = 1

    epochs: int = 15
    """Perturbations are found anew before every epoch."""
    steps: int = 20
    """Steps an epoch that train the model."""
    batch: int = 128
    """Images a step over all workers, each once as it is and once perturbed."""
    lr: float = 0.0005
    """Learning rate of Adam, annealed by a cosine."""
    perturbations: int = 10
    """How many are found at a time; each starts at random and sees its own part of the images."""
    ascent_steps: int = 20
    """Steps that find them, each of a fifth of the radius along the gradient."""
    radius: float = 4.0
    """Largest L2 norm of a perturbation of 32 x 32 pixels in 0-1; larger images have it in proportion to their side."""
    erase: int = 6
    """Squares of noise that the perturbed images get besides, each in a place of its own, of a quarter of the side
    (random erasing, Zhong et al. 2020, arXiv 1708.04896): what a patch covers is then not missed."""
    patterns: bool = True
    """Half of the perturbed images get, in place of a perturbation, what the images that a scan found have in common
    (`Split.scan`): the trigger is known by then, and its images can be shown with their right labels."""
    draw: Draw = field(default="uniform", metadata=ADDED)
    """How the images that the model is trained on are drawn, see `MixMatch`."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, "uat", erase=">= 0", epochs=">= 1", steps=">= 1", batch=">= 2", lr="> 0", perturbations=">= 1",
            ascent_steps=">= 1", radius="> 0",
        )  # fmt: skip

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        """Half of the epochs (15 at most) and of the steps of the preset's fine-tuning, and its augmentation."""
        tuned = stages.get(MixMatch.name)
        if not isinstance(tuned, MixMatch):
            return None
        epochs, steps = min(max(tuned.epochs // 2, 1), cls.epochs), max(tuned.steps // 2, 1)
        return cls(epochs=epochs, steps=steps, augment=tuned.augment)

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier("uat", "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        split = inputs["split"]
        known = find_patterns(split["marked"], context) if self.patterns and "marked" in split else None
        train(self, model, split["kept"], known, context, resume)
        return {"model": model.state_dict()}

    def check(self, images: int, image_px: int, workers: int, others: Sequence[Stage]) -> None:
        self.check_image_px(image_px)
        split = find_stage(others, Split)
        kept = images if split is None else round(split.bounds()[0] * images)
        check_batch(self.name, self.batch, workers, kept, "samples that keep their labels")

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=3 * networks.classifier, kept=networks.classifier)


@torch.no_grad()
def find_patterns(marked_N: Tensor, context: Context) -> Tensor | None:
    """What the marked samples of a label show that others do not: their mean less that of all samples without a mark.

    Args:
        marked_N: bool.

    Returns:
        float32 (K, 3, H, W) in 0-1, one of each label that has marked samples; the same on all ranks. None where there
        is none.
    """
    world, images = context.world, context.images
    marked = marked_N.to(images.labels.device)
    labels = images.labels[marked].unique()
    if len(labels) == 0:
        return None
    group_N = torch.where(marked, torch.searchsorted(labels, images.labels), len(labels))
    mine = torch.arange(len(images))[rank_slice(len(images), world.rank, world.size)]
    chunks = list(mine.split(AT_A_TIME))
    sums: Tensor | None = None
    for index, pixels in zip(chunks, images.batches(chunks), strict=True):
        if sums is None:
            sums = torch.zeros(len(labels) + 1, *pixels.shape[1:], dtype=torch.float64, device=world.device)
        # integers, so that the order of summing and the number of ranks change nothing
        sums.index_add_(0, group_N[index.to(group_N.device)].to(world.device), pixels.double())
    assert sums is not None
    counts = torch.bincount(group_N, minlength=len(labels) + 1).to(world.device)
    means = world.sum(sums).div_(255 * counts.clamp_min(1)[:, None, None, None])
    return means[:-1].sub_(means[-1:]).float()


def train(
    config: UniversalTraining,
    model: Classifier,
    kept_N: Tensor,
    known_KCHW: Tensor | None,
    context: Context,
    resume: dict[str, Any] | None,
) -> None:
    """Train `model` in place on the samples that `kept_N` (N,) says; `known_KCHW`: patterns to see through, of
    `find_patterns`."""
    optimizer = optim.adam(model.parameters(), config.lr)
    restore(resume, model, optimizer)
    network = context.world.data_parallel(model)
    positions = kept_N.nonzero().flatten()
    mine = context.mine(config.batch)
    found: Tensor | None = resume["found"] if resume else None

    def one(epoch: int, loop: EpochLoop) -> None:
        nonlocal found
        if loop.done == 0:
            found = find_perturbations(config, model, positions, context, epoch)
        assert found is not None
        found = found.to(context.world.device)
        in_turn = context.generator("uat", epoch, "order")
        order = labelled_batches(config.draw, positions, context.images.labels, config.steps, config.batch, in_turn)
        chosen = order[:, mine]
        here = chosen.to(context.world.device)
        model.train()
        left = context.images.batches(chosen[loop.done :])
        for step, pixels in enumerate(loop.steps(left, config.steps), start=loop.done):
            views = draw_views(config, pixels, mine, loop.draws)
            delta = take_turns(found, mine)
            if known_KCHW is not None:
                before = ((epoch - 1) * config.steps + step) * config.batch
                delta = every_other(delta, known_KCHW, mine, before)
            seen = perturb(config, views, delta)
            if config.erase:
                seen = erase(config, seen, mine, loop.draws)
            both = torch.cat([views, seen])
            labels = context.images.labels[here[step]]
            with context.autocast():
                logits = network(both)
            loss = F.cross_entropy(logits.float(), torch.cat([labels, labels]))
            optimizer.zero_grad()
            loss.backward()
            progress = (epoch - 1 + step / config.steps) / config.epochs
            optim.set_lr(optimizer, config.lr * optim.cosine(progress))
            optimizer.step()
            loop.add(config.batch, loss=loss)

    run_epochs(config, model, optimizer, context, resume, one, more=lambda: {"found": found})


def find_perturbations(
    config: UniversalTraining, model: Classifier, positions: Tensor, context: Context, epoch: int
) -> Tensor:
    """Perturbations that raise the loss of the given labels most: float32 (P, 3, H, W) in 0-1, the same on all
    ranks."""
    world, mine = context.world, context.mine(config.batch)
    names = ("uat", epoch, "ascent")
    order = cycling_batches(positions, config.ascent_steps, config.batch, context.generator(*names, "order"))
    chosen, draws = order[:, mine], context.generator(*names, "augment")
    found: Tensor | None = None
    was_training = model.training
    model.eval()
    for pixels, here in zip(context.images.batches(chosen), chosen):
        radius = config.radius * pixels.shape[2] / 32
        if found is None:
            shape = (config.perturbations, *pixels.shape[1:])
            found = torch.randn(shape, generator=context.generator(*names, "start")).to(world.device)
            found = onto_ball(found, radius / 10)
        views = draw_views(config, pixels, mine, draws)
        delta = found.clone().requires_grad_()
        with context.autocast():
            logits = model(perturb(config, views, take_turns(delta, mine)))
        loss = F.cross_entropy(logits.float(), context.images.labels[here.to(world.device)], reduction="sum")
        (slope,) = torch.autograd.grad(loss, delta)
        slope = world.sum(slope)
        step = slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        found = onto_ball(found + radius / 5 * step, radius)
    model.train(was_training)
    assert found is not None
    return found


def onto_ball(delta_PCHW: Tensor, radius: float) -> Tensor:
    """Perturbations with an L2 norm above `radius` shortened to it."""
    norms = delta_PCHW.flatten(1).norm(dim=1)
    return delta_PCHW * (radius / norms.clamp_min(radius))[:, None, None, None]


def draw_views(config: UniversalTraining, pixels: Tensor, mine: slice, draws: torch.Generator) -> Tensor:
    """This rank's augmented images of a global batch."""
    height, width = pixels.shape[2:]
    params = augment.draw(config.augment, config.batch, height=height, width=width, generator=draws)
    return augment.apply(config.augment, pixels, params[mine])


def take_turns(delta_PCHW: Tensor, mine: slice) -> Tensor:
    """The perturbation of each of this rank's images: (b, 3, H, W). They take turns over the global batch."""
    return delta_PCHW[torch.arange(mine.start, mine.stop, device=delta_PCHW.device) % len(delta_PCHW)]


def every_other(delta_BCHW: Tensor, known_KCHW: Tensor, mine: slice, before: int) -> Tensor:
    """The same with a known pattern in place of every other perturbation of the global batch; patterns take turns, and
    go on with it after the `before` images of earlier batches."""
    place = torch.arange(mine.start, mine.stop, device=delta_BCHW.device)
    patterns = known_KCHW[((before + place) // 2) % len(known_KCHW)]
    return torch.where((place % 2 == 1)[:, None, None, None], patterns, delta_BCHW)


def perturb(config: UniversalTraining, views: Tensor, delta_BCHW: Tensor) -> Tensor:
    """Normalised images with perturbations added, one each; pixels stay in 0-1."""
    mean, std = (views.new_tensor(v)[:, None, None] for v in (config.augment.mean, config.augment.std))
    return torch.clamp(views + delta_BCHW / std, -mean / std, (1 - mean) / std)


def erase(config: UniversalTraining, views: Tensor, mine: slice, draws: torch.Generator) -> Tensor:
    """Normalised images with squares of uniform noise in 0-1 pasted over them, `config.erase` each."""
    count, height, width = config.batch, *views.shape[2:]
    side = max(height // 4, 1)
    corners = torch.rand(count, config.erase, 2, generator=draws)[mine].to(views.device)
    noise = torch.rand(count, 3, height, width, generator=draws)[mine].to(views.device)
    tops, lefts = ((corners * torch.tensor([height - side + 1, width - side + 1], device=views.device)).long()).unbind(
        2
    )
    rows, columns = (torch.arange(size, device=views.device) for size in (height, width))
    down = (rows >= tops[..., None]) & (rows < tops[..., None] + side)
    across = (columns >= lefts[..., None]) & (columns < lefts[..., None] + side)
    covered = (down[..., :, None] & across[..., None, :]).any(dim=1)[:, None]
    mean, std = (views.new_tensor(v)[:, None, None] for v in (config.augment.mean, config.augment.std))
    return torch.where(covered, (noise - mean) / std, views)
