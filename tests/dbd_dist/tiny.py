"""A data set, networks and stages small enough for a test, and what the ranks of a test run on them.

Every function that takes a `World` gives the same answer in a world of one (called here) and of two (`two_ranks`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.dataset.manifest import open_dataset
from dbd_dist import seeds
from dbd_dist.craft import job as crafting
from dbd_dist.data import augment
from dbd_dist.data.loaders import Images, ResidentImages
from dbd_dist.distributed import exchange
from dbd_dist.distributed.world import World
from dbd_dist.evaluation.evaluator import Evaluator
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded
from dbd_dist.stages import (
    DPSGD,
    Clustering,
    Distillation,
    Inversion,
    Isolation,
    MixMatch,
    SimCLR,
    Spectral,
    Split,
    Supervised,
    Teacher,
    UniversalTraining,
    Unlearning,
    Warmup,
    distillation,
    dpsgd,
    mixmatch,
    simclr,
    split,
    supervised,
    teacher,
    uat,
    unlearning,
    warmup,
)
from dbd_dist.stages.context import Context, EpochEnd
from dbd_dist.stages.flagged import flag

CLASSES = 4
MODEL = ModelConfig(depths=(1, 1), widths=(8, 16), projection_dim=16)
WEAK = replace(augment.weak_pad(), pad_px=2)

SIMCLR = SimCLR(epochs=1, batch=24, lr=0.1)
WARMUP = Warmup(epochs=1, batch=24, lr=0.01, augment=WEAK)
SPLIT = Split(batch=10, augment=WEAK)
MIXMATCH = MixMatch(epochs=1, steps=3, batch=12, augment=WEAK)
SAMPLE_LOSS = WARMUP.offers()["sample_loss"]
SUPERVISED = Supervised(epochs=1, batch=24, augment=WEAK)
UNLEARNING = Unlearning(epochs=1, steps=2, batch=8, lr=0.05, augment=WEAK)
DETECTORS = {"spectral": Spectral(batch=10), "clustering": Clustering(batch=10, dims=3, silhouette=-1.0)}
UAT = UniversalTraining(epochs=1, steps=2, batch=12, ascent_steps=3, augment=WEAK)
PRIVATE = DPSGD(epochs=1, batch=24, noise=0.5, chunk=5, augment=WEAK)
TEACHER = Teacher(epochs=1, batch=24, augment=WEAK)
DISTILLATION = Distillation(epochs=1, batch=24, augment=WEAK)


def make_images(count: int = 48, px: int = 16, device: torch.device | str = "cpu") -> ResidentImages:
    """Noise whose brightness tells its class, so that there is something to learn."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    pixels = torch.randint(0, 128, (count, px, px, 3), dtype=torch.uint8, generator=generator)
    pixels += (labels * 40).to(torch.uint8)[:, None, None, None]
    return ResidentImages(pixels.to(device), labels.to(device))


def make_context(
    world: World, images: Images, *, sync_bn: bool = True, report: Callable[[EpochEnd], None] = lambda end: None
) -> Context:
    return Context(
        world=world, images=images, num_classes=CLASSES, seed=5, bf16=False, sync_bn=sync_bn, report=report
    )  # fmt: skip


def make_contrastive(context: Context, seed: int = 1) -> ContrastiveModel:
    return context.prepare(seeded(lambda: ContrastiveModel(MODEL), seeds.generator(seed, "contrastive")))


def make_classifier(context: Context, seed: int = 1) -> Classifier:
    return context.prepare(seeded(lambda: Classifier(MODEL, CLASSES), seeds.generator(seed, "classifier")))


def make_group_normalised(context: Context, seed: int = 1) -> Classifier:
    config = replace(MODEL, norm="group")
    model = seeded(lambda: Classifier(config, CLASSES), seeds.generator(seed, "classifier"))
    return context.prepare(model, compiled=False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# -- a stage each: (config, context, model, resume) -> the model, trained in place


def run_simclr(config: SimCLR, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    simclr.pretrain(config, model, context, resume)


def run_warmup(config: Warmup, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    warmup.train_head(config, model, context, resume)


def run_mixmatch(config: MixMatch, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    mixmatch.fine_tune(config, SPLIT, SAMPLE_LOSS, model, None, context, resume)


def run_supervised(config: Supervised, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    supervised.train(config, model, context, resume)


def run_unlearning(config: Unlearning, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    isolated = torch.arange(len(context.images)) % 7 == 0
    unlearning.unlearn(config, model, flag(samples=isolated), context, resume)


def run_uat(config: UniversalTraining, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    uat.train(config, model, torch.arange(len(context.images)) % 3 > 0, uat_patterns(context), context, resume)


def run_dpsgd(config: DPSGD, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    dpsgd.train(config, model, context, resume)


def run_teacher(config: Teacher, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    teacher.fine_tune(config, model, replace(context, holdout=context.images), resume)


def run_distillation(config: Distillation, context: Context, model: Any, resume: dict[str, Any] | None = None) -> None:
    tutor = make_classifier(context, seed=9).eval().requires_grad_(False)
    distillation.distil(config, model, tutor, replace(context, holdout=context.images), resume)


STAGES: dict[str, tuple[Any, Callable[..., None], Callable[..., nn.Module]]] = {
    "simclr": (SIMCLR, run_simclr, make_contrastive),
    "warmup": (WARMUP, run_warmup, make_classifier),
    "mixmatch": (MIXMATCH, run_mixmatch, make_classifier),
    "supervised": (SUPERVISED, run_supervised, make_classifier),
    "unlearning": (UNLEARNING, run_unlearning, make_classifier),
    "uat": (UAT, run_uat, make_classifier),
    "dpsgd": (PRIVATE, run_dpsgd, make_group_normalised),
    "teacher": (TEACHER, run_teacher, make_classifier),
    "distillation": (DISTILLATION, run_distillation, make_classifier),
}


# -- what ranks run


def simclr_gradient(world: World, *, sync_bn: bool) -> Tensor:
    """The gradient of one whole global batch at the initial weights, as the stage leaves it after its only step."""
    images = make_images(SIMCLR.batch)
    found: list[Tensor] = []

    def keep_gradient(end: EpochEnd) -> None:
        found.append(torch.cat([p.grad.flatten() for p in end.model.parameters() if p.grad is not None]))

    context = make_context(world, images, sync_bn=sync_bn, report=keep_gradient)
    run_simclr(SIMCLR, context, make_contrastive(context))
    assert len(found) == 1
    return found[0].clone()


def train_stage(world: World, stage: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Weights and metrics after an epoch of a stage."""
    config, run, make = STAGES[stage]
    rows: list[dict[str, float]] = []
    context = make_context(world, make_images(device=world.device), report=lambda end: rows.append(end.metrics))
    model = make(context)
    run(config, context, model)
    return weights_of(model), rows[-1]


def detect(world: World, detector: str) -> dict[str, Any]:
    """What a detector flags by the features of a model with random weights."""
    context = replace(make_context(world, make_images()), model=MODEL)
    return dict(DETECTORS[detector].run(context, {"model": make_classifier(context).state_dict()}, None)["flagged"])


def isolate(world: World) -> dict[str, Any]:
    """What is isolated after an epoch."""
    context = replace(make_context(world, make_images()), model=MODEL)
    stage = Isolation(epochs=1, batch=24, share=0.1, augment=WEAK)
    return dict(stage.run(context, {}, None)["flagged"])


def invert(world: World, images: int, *, bf16: bool = False) -> dict[str, Any]:
    """Triggers of a model with random weights."""
    context = replace(make_context(world, make_images()), model=MODEL, holdout=make_images(20), bf16=bf16)
    stage = Inversion(rounds=3, steps=2, per_class=4, images=images)
    return stage.run(context, {"model": make_classifier(context).state_dict()}, None)


def train_chunked(world: World) -> tuple[dict[str, Tensor], dict[str, float]]:
    """As `train_stage` with pretraining in three chunks a batch."""
    rows: list[dict[str, float]] = []
    context = make_context(world, make_images(), report=lambda end: rows.append(end.metrics))
    model = make_contrastive(context)
    run_simclr(replace(SIMCLR, chunk=8), context, model)
    return weights_of(model), rows[-1]


def train_mixmatch_unmixed(world: World) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An epoch of MixMatch with every mixing weight 1: the one thing that depends on the number of ranks, the partner,
    has no weight then. Six labelled images a rank are a multiple of the three interleaved forwards, so that these hold
    the same images in both worlds."""
    drawn = mixmatch._mixing_weights
    mixmatch._mixing_weights = lambda config, generator: [1.0] * config.steps  # type: ignore[assignment]
    try:
        return train_stage(world, "mixmatch")
    finally:
        mixmatch._mixing_weights = drawn


def sync_norm(world: World, x: Tensor, upstream: Tensor, weight: Tensor, bias: Tensor, share: int) -> dict[str, Tensor]:
    """Batch norm over a global batch of which rank 0 holds the first `share` samples, forward and backward."""
    norm: nn.Module = nn.BatchNorm1d(x.shape[1]) if x.dim() == 2 else nn.BatchNorm2d(x.shape[1])
    with torch.no_grad():
        norm.weight.copy_(weight)  # type: ignore[operator]
        norm.bias.copy_(bias)  # type: ignore[operator]
    norm = world.synchronise_batch_norm(nn.Sequential(norm))[0]
    mine = slice(None) if world.size == 1 else (slice(0, share), slice(share, None))[world.rank]
    x_mine = x[mine].clone(memory_format=torch.preserve_format).requires_grad_()
    for _ in range(2):  # running statistics of more than one step
        output = norm(x_mine)
    output.backward(upstream[mine])
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    after = norm.eval()(x_mine)
    return {
        "output": world.gather(output.detach()),
        "grad_input": world.gather(x_mine.grad),
        "grad_weight": world.sum(norm.weight.grad),
        "grad_bias": world.sum(norm.bias.grad),
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "num_batches_tracked": norm.num_batches_tracked,
        "eval_output": world.gather(after.detach()),
    }


def features(world: World, backbone: str) -> Tensor:
    """Features (b, D) of this rank's part of four images, normalised over all four."""
    config = ModelConfig(backbone=backbone)
    network = seeded(config.build_backbone, seeds.generator(1, "backbone"))
    network = make_context(world, make_images()).prepare(network).train()
    pixels = torch.randn(4, 3, config.min_image_px, config.min_image_px, generator=seeds.generator(1, "images"))
    part = pixels.chunk(world.size)[world.rank]
    with torch.no_grad():
        return network(part.contiguous(memory_format=torch.channels_last))


def forward_each(world: World, batches: list[Tensor], *, apart: bool = True) -> dict[str, Tensor]:
    """A network with batch norm over each of `batches`, forward and backward; or over all of them as one batch."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 5), nn.BatchNorm1d(5)
    ).to(memory_format=torch.channels_last)
    network = world.synchronise_batch_norm(network)
    part = slice(world.rank * len(batches[0]) // world.size, (world.rank + 1) * len(batches[0]) // world.size)
    mine = [batch[part].contiguous(memory_format=torch.channels_last).requires_grad_() for batch in batches]
    parallel = world.data_parallel(network)  # kept: it averages gradients for as long as it lives
    outputs = world.forward_each(parallel, mine if apart else [torch.cat(mine)])
    weights = torch.arange(1.0, 1 + outputs[0].shape[1])
    torch.stack([((k + 1) * weights * out.pow(3)).mean() for k, out in enumerate(outputs)]).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in network.named_parameters() if p.grad is not None}
    inputs = {f"grad of batch {k}": world.gather(x.grad) / world.size for k, x in enumerate(mine) if x.grad is not None}
    found = {f"output {k}": world.gather(out.detach()) for k, out in enumerate(outputs)}
    return found | gradients | inputs | {name: b.clone() for name, b in network.named_buffers()}


def exchanged(world: World, sizes: list[int], *, one_node: bool = True) -> list[list[Tensor]]:
    """What `exchange.all_gather` and torch's own make of tensors of every size, and whether sockets did it."""
    exchange.close()
    node = exchange._node
    if not one_node and world.rank == 1:
        exchange._node = lambda: None  # as on a system where it cannot be told
    try:
        found = [[exchange.all_gather(x), world.gather(x[None])] for x in (torch.rand(n) + world.rank for n in sizes)]
        transposed = torch.arange(6).view(2, 3).T + world.rank
        found.append([exchange.all_gather(transposed), world.gather(transposed[None])])
        return [*found, [torch.tensor(links is not None) for links in exchange._links.values()]]
    finally:
        exchange._node = node
        exchange.close()


def split_losses(world: World, count: int) -> Tensor:
    """The filter's losses of `count` samples, which the ranks need not share equally."""
    context = make_context(world, make_images(count))
    return split.measure_losses(SPLIT, SAMPLE_LOSS, make_classifier(context), context, epoch=1)


def kept_by(world: World, rule: str, score: str) -> Tensor:
    """Who keeps a label by that rule and score."""
    context = make_context(world, make_images(37))
    config = replace(SPLIT, rule=rule, score=score, neighbours=3)
    losses = split.measure_losses(config, SAMPLE_LOSS, make_classifier(context), context, epoch=1)
    return split.split(losses, context.images.labels, CLASSES, config)


def marked_by(world: World, pixels_NHWC: Tensor, labels_N: Tensor) -> Tensor:
    """Who carries a pattern that marks its label."""
    return split.find_marked(make_context(world, ResidentImages(pixels_NHWC, labels_N)))


def perturbations(world: World) -> Tensor:
    """Of the unlearning stage, for a random classifier."""
    context = make_context(world, make_images())
    return uat.find_perturbations(UAT, make_classifier(context), torch.arange(30), context, epoch=2)


def uat_patterns(context: Context) -> Tensor | None:
    """Of marked samples of two labels."""
    here = torch.arange(len(context.images))
    return uat.find_patterns((here % 5 == 0) & (context.images.labels.cpu() < 2), context)


def patterns(world: World) -> Tensor | None:
    """What marked samples have in common."""
    return uat_patterns(make_context(world, make_images(37)))


def examine(world: World, folder: Path) -> list[Any]:
    """A random classifier on a prepared data set."""
    dataset = open_dataset(folder)
    model = seeded(lambda: Classifier(MODEL, dataset.manifest.num_classes), seeds.generator(3, "examine"))
    measured = Evaluator(dataset, world, augment.none(), bf16=False).measure(model)
    return [measured.clean_acc, measured.per_class_acc, measured.asr, measured.robust_acc, measured.asr_untriggered]


def collectives(world: World) -> dict[str, Any]:
    """Every operation of `World` on values that differ by rank: rank r holds r + 1 rows."""
    rows = torch.arange(world.rank + 1).float() + 10 * world.rank
    equal = torch.full((2,), float(world.rank + 1), requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])[: 2 * world.size] * (world.rank + 1)
    (world.gather_with_grad(equal) * weights).sum().backward()
    # used transposed, as the contrastive loss does: its gradient comes back in another memory layout
    square = torch.ones(3, 2, requires_grad=True)
    weights_T = torch.arange(6.0 * world.size).view(2, 3 * world.size)
    (world.gather_with_grad(square).T * weights_T).sum().backward()
    before = equal.detach().clone()
    summed = world.sum(before)
    return {
        "gather": world.gather(rows),
        "grad": equal.grad,
        "grad_transposed": square.grad,
        "sum": summed,
        "mean": world.mean(before),
        "unchanged": before,
        "broadcast": world.broadcast({"from": world.rank}),
        "is_main": world.is_main,
    }


def craft(world: World, job: dict[str, Any]) -> None:
    """A rank's part of an artefact."""
    crafting.run(crafting.Job.from_dict(job), world)
