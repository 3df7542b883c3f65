"""What a device computes, beside plain float32 on the CPU: augmentation, losses, every stage, and each faster form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.data.augment.batched import apply_batched, make_plan
from dbd_dist.data.loaders import ResidentImages, copied_ahead
from dbd_dist.distributed.world import World
from dbd_dist.losses import nt_xent, probability_mse, soft_cross_entropy, symmetric_cross_entropy
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded
from dbd_dist.stages import MixMatch, SimCLR, Split, Supervised, Warmup, mixmatch, simclr, split, supervised, warmup
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop

CPU = torch.device("cpu")
CLASSES = 4
NETWORK = ModelConfig(depths=(1, 1), widths=(16, 32), projection_dim=16)
WEAK = replace(augment.weak_pad(), pad_px=2)
WARMUP = Warmup(epochs=1, batch=32, lr=0.01, augment=WEAK)
SPLIT = Split(batch=32, augment=WEAK)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison."""

    name: str
    error: float
    """Largest difference, in the unit of `of`."""
    allowed: float
    of: str

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed


def checks(group: str, device: torch.device) -> list[Check]:
    """Those of one group, in float32 without TF32 unless a name says otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return list(GROUPS[group](device))
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def groups(device: torch.device) -> list[str]:
    """What there is to check on a device."""
    return [name for name in GROUPS if device.type == "cuda" or name not in ON_CUDA]


def augmentations(device: torch.device) -> Iterator[Check]:
    settings = {"simclr": augment.simclr(), "weak, padded": augment.weak_pad(), "weak, resized": augment.weak_resized()}
    for px, count in ((32, 256), (224, 16)):
        images = torch.randint(0, 256, (count, px, px, 3), dtype=torch.uint8, generator=_generator(px))
        for name, config in settings.items():
            params = augment.draw(config, count, height=px, width=px, generator=_generator(1))
            theirs = augment.apply(config, images.permute(0, 3, 1, 2), params)
            ours = apply_batched(config, images.to(device), make_plan(params, device)).permute(0, 3, 1, 2).cpu()
            levels = (ours - theirs).abs().max().item() * max(config.std) * 255
            yield Check(name=f"augmentation, {name}, {px} px", error=levels, allowed=0.05, of="grey levels")


def losses(device: torch.device) -> Iterator[Check]:
    logits = torch.randn(64, 10, generator=_generator(2))
    labels = torch.randint(0, 10, (64,), generator=_generator(3))
    target = torch.softmax(torch.randn(64, 10, generator=_generator(4)), dim=1)
    first, second = (torch.randn(64, 16, generator=_generator(i)) for i in (5, 6))
    cases: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "NT-Xent": (first, lambda z: nt_xent(z, second.to(z.device), 0.5, World(device=z.device))),
        "SCE": (logits, lambda z: symmetric_cross_entropy(z, labels.to(z.device), 0.1, 1.0).mean()),
        "soft cross-entropy": (logits, lambda z: soft_cross_entropy(z, target.to(z.device))),
        "probability MSE": (logits, lambda z: probability_mse(z, target.to(z.device))),
    }
    for name, (values, loss_of) in cases.items():
        found = []
        for where in (CPU, device):
            leaf = values.to(where, copy=True).requires_grad_()
            loss = loss_of(leaf)
            loss.backward()
            assert leaf.grad is not None
            found.append((loss.detach().cpu(), leaf.grad.cpu()))
        (loss, grad), (their_loss, their_grad) = found
        yield Check(name=f"loss, {name}", error=_relative(loss, their_loss), allowed=1e-5, of="loss")
        yield Check(name=f"gradient, {name}", error=_relative(grad, their_grad), allowed=1e-4, of="largest gradient")


def stages(device: torch.device) -> Iterator[Check]:
    """An epoch of a few steps from the same weights; rounding grows with every step."""
    yield Check(
        name="stage, split, device and CPU",
        error=_relative(_filter(CPU), _filter(device)),
        allowed=1e-3,
        of="largest loss",
    )
    for name in STAGES:
        there = _train(name, CPU)
        here = _train(name, device)
        yield Check(
            name=f"stage, {name}, device and CPU", error=_distance(there, here), allowed=2e-2, of="weights moved"
        )
    for name in ("simclr", "mixmatch"):
        yield Check(
            name=f"stage, {name}, bf16 and fp32",
            error=_distance(_train(name, device), _train(name, device, bf16=True)),
            allowed=0.3,
            of="weights moved",
        )


def chunks(device: torch.device) -> Iterator[Check]:
    """One chunk a batch computes everything twice and changes nothing."""
    error = _distance(_train("simclr", device), _train("simclr", device, chunk=32))
    yield Check(name="simclr, one chunk and plain", error=error, allowed=1e-2, of="weights moved")


def replayed(device: torch.device) -> Iterator[Check]:
    error = _distance(_train("mixmatch", device), _train("mixmatch", device, cuda_graphs=True))
    yield Check(name="mixmatch, replayed and plain", error=error, allowed=2e-2, of="weights moved")


def compiled(device: torch.device) -> Iterator[Check]:
    for name, replay in (("simclr", False), ("mixmatch", False), ("mixmatch", True)):
        error = _distance(_train(name, device), _train(name, device, compile=True, cuda_graphs=replay))
        title = f"{name}, compiled{' and replayed' if replay else ''}, and plain"
        yield Check(name=title, error=error, allowed=2e-2, of="weights moved")


def waits(device: torch.device) -> Iterator[Check]:
    """CUDA raises at the first wait inside a step."""
    for name in STAGES:
        _train(name, device, watched=True)
        yield Check(name=f"stage, {name}, waits inside steps", error=0, allowed=0, of="waits")


def streams(device: torch.device) -> Iterator[Check]:
    images = torch.randint(0, 256, (20, 8, 64, 64, 3), dtype=torch.uint8, generator=_generator(7))
    ring = torch.empty_like(images[0])

    def read() -> Iterator[Tensor]:
        for batch in images:
            yield ring.copy_(batch)  # overwritten as FFCV's ring is

    wrong = torch.zeros((), device=device)
    busy = torch.randn(1024, 1024, device=device)
    for batch, truth in zip(copied_ahead(read(), device), images.to(device)):
        busy = (busy @ busy).tanh()
        wrong += (batch != truth).sum() + 0 * busy.sum()
    yield Check(name="batches copied ahead and read", error=wrong.item(), allowed=0, of="bytes that differ")


# -- one short epoch of a stage


def _contrastive(context: Context) -> ContrastiveModel:
    return context.prepare(seeded(lambda: ContrastiveModel(NETWORK), seeds.generator(1, "contrastive")))


def _classifier(context: Context) -> Classifier:
    return context.prepare(seeded(lambda: Classifier(NETWORK, CLASSES), seeds.generator(1, "classifier")))


def _simclr(model: Any, context: Context, chunk: int | None) -> None:
    simclr.pretrain(SimCLR(epochs=1, batch=32, lr=0.1, chunk=chunk), model, context, None)


def _warmup(model: Any, context: Context, chunk: int | None) -> None:
    warmup.train_head(WARMUP, model, context, None)


def _mixmatch(model: Any, context: Context, chunk: int | None) -> None:
    """Four steps on a split that is given: a split of its own would turn one rounding into other images."""
    config = MixMatch(epochs=1, steps=4, batch=16, lr=0.05, augment=WEAK)
    backward = mixmatch.make_backward(config, model, context)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)  # Adam's first steps are signs of gradients
    loop = EpochLoop("mixmatch", 1, 1, context)
    kept = torch.arange(len(context.images)) % 2 == 0
    mixmatch.train_epoch(config, model, backward, optimizer, context, 1, (kept, ~kept), loop)


def _supervised(model: Any, context: Context, chunk: int | None) -> None:
    supervised.train(Supervised(epochs=1, batch=32, lr=0.05, augment=WEAK), model, context, None)


STAGES: dict[str, tuple[Callable[[Context], nn.Module], Callable[[Any, Context, int | None], None]]] = {
    "simclr": (_contrastive, _simclr),
    "warmup": (_classifier, _warmup),
    "mixmatch": (_classifier, _mixmatch),
    "supervised": (_classifier, _supervised),
}


def _context(device: torch.device, bf16: bool = False, watched: bool = False, **form: bool) -> Context:
    """128 images of noise whose brightness tells the class."""
    generator = _generator(8)
    labels = torch.randint(0, CLASSES, (128,), generator=generator)
    pixels = torch.randint(0, 128, (128, 16, 16, 3), dtype=torch.uint8, generator=generator)
    pixels += (labels * 40).to(torch.uint8)[:, None, None, None]

    def tick(_stage: str, _epoch: int, _epochs: int, step: int, steps: int) -> None:
        if watched:
            torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    return Context(
        world=World(device=device), images=ResidentImages(pixels.to(device), labels.to(device)), num_classes=CLASSES,
        seed=5, bf16=bf16, sync_bn=True, report=lambda end: None, tick=tick, **_forms(form),
    )  # fmt: skip


def _train(stage: str, device: torch.device, *, chunk: int | None = None, **options: bool) -> Tensor:
    """By how much an epoch moves the weights: all in one vector (n,), on the CPU."""
    context = _context(device, **options)
    make, run = STAGES[stage]
    model = make(context)
    before = _weights(model)
    try:
        run(model, context, chunk)
    finally:
        if options.get("watched"):
            torch.cuda.set_sync_debug_mode("default")
    return _weights(model) - before


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()]).clone()


def _filter(device: torch.device) -> Tensor:
    context = _context(device)
    return split.measure_losses(SPLIT, WARMUP.offers()["sample_loss"], _classifier(context), context, 1)


GROUPS: dict[str, Callable[[torch.device], Iterator[Check]]] = {
    "augmentation": augmentations,
    "losses": losses,
    "stages": stages,
    "chunks": chunks,
    "copied ahead": streams,
    "waits": waits,
    "replayed": replayed,
    "compiled": compiled,
}
ON_CUDA = ("copied ahead", "waits", "replayed", "compiled")
"""Groups about what exists there alone."""


def _forms(form: dict[str, bool]) -> dict[str, Any]:
    return {"compile": form.get("compile", False), "cuda_graphs": form.get("cuda_graphs", False)}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / one.abs().max().clamp(min=1e-12)).item()


def _distance(one: Tensor, other: Tensor) -> float:
    """The Euclidean distance of two vectors over the length of the first."""
    return ((one - other).norm() / one.norm()).item()
