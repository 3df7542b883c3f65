"""Training steps on ResNet-18 with the CIFAR stem: the whole step as the stage runs it, and the part of it that is
forward pass, loss, backward pass and optimiser on inputs that lie ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import torch
import torch.nn.functional as F

from dbd_dist import optim
from dbd_dist.bench.floor import flops, peak_flops
from dbd_dist.bench.row import Row, Setup, ratio
from dbd_dist.bench.timing import rounds
from dbd_dist.data import augment
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.distributed.world import World
from dbd_dist.losses import nt_xent
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel
from dbd_dist.stages import MixMatch, SimCLR, mixmatch, simclr
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop

CLASSES = 10
PX = 32


def make_context(setup: Setup, images: int, *, compile: bool = False, cuda_graphs: bool = False) -> Context:
    """Noise in memory, on the device; what it shows does not matter to the time."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, PX, PX, 3), dtype=torch.uint8, generator=generator).to(setup.device)
    labels = torch.randint(0, CLASSES, (images,), generator=generator).to(setup.device)
    return Context(
        world=World(device=setup.device), images=ResidentImages(pixels, labels), num_classes=CLASSES, seed=0,
        bf16=setup.bf16, sync_bn=True, compile=compile, cuda_graphs=cuda_graphs, report=lambda end: None,
    )  # fmt: skip


def network_for(setup: Setup) -> ModelConfig:
    return ModelConfig(depths=(1, 1), widths=(8, 16)) if setup.quick else ModelConfig()


def rows(
    setup: Setup,
    name: str,
    batch: int,
    images: int,
    steps: int,
    count: int,
    whole: Callable[[], object],
    core: Callable[[], object],
    note: str = "",
) -> Iterator[Row]:
    """The rows of one kind of step.

    Args:
        images: that a step takes, labelled and unlabelled.
        count: FLOPs of a step.
        whole: runs `steps` steps as the stage does.
        core: one forward pass, loss, backward pass and optimiser step.
    """

    def cores() -> None:
        for _ in range(steps):
            core()

    works = {"whole": whole, "core": cores}
    times = rounds(works, repeats=setup.repeats, device=setup.device, clock=setup.clock, warm_up=2)
    peak, source = peak_flops(setup.device, setup.bf16, setup.threads)
    ms = {part: [t / steps * 1000 for t in seconds] for part, seconds in times.items()}
    shares = [1 - c / w for w, c in zip(ms["whole"], ms["core"], strict=True)]
    title = f"batch {batch}{note}, {setup.precision}"
    floor = count / peak * 1000
    for part in ("whole", "core"):
        yield Row(
            bench=name,
            name=f"{title}, {'whole step' if part == 'whole' else 'forward, backward, optimiser'}",
            unit="ms a step",
            values=ms[part],
            floor=floor,
            floor_is=f"{count / 1e9:.1f} GFLOP over {peak / 1e12:.3g} TFLOP/s ({source})",
            reference="whole step",
            ratio=ratio(ms["whole"], ms[part]),
            notes={
                "images_per_s": median(images / t * 1000 for t in ms[part]),
                "mfu": median(floor / t for t in ms[part]),
            },
        )
    yield Row(bench=name, name=f"{title}, share of a step outside of these", unit="fraction", values=shares)


def measure_simclr(setup: Setup) -> Iterator[Row]:
    batch = setup.pick(cuda=512, cpu=16, quick=8)
    steps = setup.pick(cuda=20, cpu=1, quick=1)
    count = 0
    for compiled in (False, True) if setup.device.type == "cuda" else (False,):
        context = make_context(setup, batch * steps, compile=compiled)
        config = SimCLR(batch=batch)
        model = context.prepare(ContrastiveModel(network_for(setup)))
        optimizer = simclr.make_optimizer(config, model)
        model.train()
        pixels = next(context.images.batches([torch.arange(batch)]))
        views = torch.cat([_views(config.augment, pixels) for _ in range(2)])

        def core(model=model, optimizer=optimizer, views=views, context=context, config=config) -> None:
            optimizer.zero_grad()
            simclr.backward(
                model, views, lambda a, b: nt_xent(a, b, config.temperature, context.world), context
            )  # fmt: skip
            optimizer.step()

        def whole(model=model, optimizer=optimizer, context=context, config=config) -> None:
            simclr.train_epoch(config, model, model, optimizer, context, 1, EpochLoop("simclr", 1, 1, context))

        count = count or flops(core)  # before anything is compiled: the counter sees single operations
        yield from rows(setup, "simclr", batch, batch, steps, count, whole, core, ", compiled" if compiled else "")


def measure_mixmatch(setup: Setup) -> Iterator[Row]:
    batch = setup.pick(cuda=64, cpu=8, quick=6)
    steps = setup.pick(cuda=50, cpu=1, quick=1)
    on_gpu = setup.device.type == "cuda"
    forms = [(False, False), *([(True, False), (False, True), (True, True)] if on_gpu else [])]
    count = 0
    for compiled, replayed in forms:
        context = make_context(setup, 8 * batch, compile=compiled, cuda_graphs=replayed)
        config = MixMatch(batch=batch, steps=steps)
        model = context.prepare(Classifier(network_for(setup), CLASSES))
        optimizer = optim.adam(model.parameters(), config.lr)
        model.train()
        backward = mixmatch.make_backward(config, model, context)
        pixels = next(context.images.batches([torch.arange(batch)]))
        sharp, first, second = (_views(config.augment, pixels) for _ in range(3))
        given = F.one_hot(context.images.labels[:batch], CLASSES).float()
        order = torch.randperm(3 * batch, generator=torch.Generator().manual_seed(0)).to(setup.device)
        kept = torch.arange(len(context.images)) % 2 == 0

        def core(
            backward=backward, optimizer=optimizer, views=(sharp, first, second), given=given, order=order
        ) -> None:  # fmt: skip
            backward(views, given, mix=0.8, order=order, lambda_u=1.0)
            optimizer.step()

        def whole(
            config=config, model=model, backward=backward, optimizer=optimizer, context=context, kept=kept
        ) -> None:  # fmt: skip
            loop = EpochLoop("mixmatch", 1, 1, context)
            mixmatch.train_epoch(config, model, backward, optimizer, context, 1, (kept, ~kept), loop)

        count = count or flops(core)
        note = (", compiled" if compiled else "") + (", replayed" if replayed else "")
        yield from rows(setup, "mixmatch", batch, 2 * batch, steps, count, whole, core, note)


def _views(config: augment.AugmentConfig, pixels: torch.Tensor) -> torch.Tensor:
    count, _, height, width = pixels.shape
    generator = torch.Generator().manual_seed(1)
    return augment.apply(config, pixels, augment.draw(config, count, height=height, width=width, generator=generator))
