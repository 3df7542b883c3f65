"""One augmented view: ours beside torchvision's pipelines, from bytes in memory to the normalised tensor.

On a CPU in one thread and its own time. Ours includes the drawing of the parameters. "batched" is the form that other
devices run; on a CPU it is measured there beside the compiled one. torchvision always runs on the CPU, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dbd_dist.bench import torchvision
from dbd_dist.bench.floor import peak_bytes
from dbd_dist.bench.images import smooth
from dbd_dist.bench.row import Row, Setup, ratio
from dbd_dist.bench.timing import Work, rounds
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.augment.batched import apply_batched, make_plan

SETTINGS: dict[str, Callable[[int], AugmentConfig]] = {
    "simclr": lambda size: augment.simclr(),
    "simclr, no blur": lambda size: augment.simclr(blur_p=0.0),
    "weak": lambda size: augment.weak_pad() if size < 64 else augment.weak_resized(),
}
REFERENCE = "torchvision, Pillow"


def measure(setup: Setup) -> Iterator[Row]:
    for size in (32, 224):
        for setting in SETTINGS:
            yield from _measure(setup, setting, size)


def ours(config: AugmentConfig, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images_BCHW.shape
    params = augment.draw(config, count, height=height, width=width, generator=generator)
    return augment.apply(config, images_BCHW, params)


def batched(config: AugmentConfig, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images_BCHW.shape
    params = augment.draw(config, count, height=height, width=width, generator=generator)
    return apply_batched(config, images_BCHW.permute(0, 2, 3, 1), make_plan(params, images_BCHW.device))


def _measure(setup: Setup, setting: str, size: int) -> Iterator[Row]:
    config = SETTINGS[setting](size)
    generator = torch.Generator().manual_seed(0)
    many = setup.pick(cuda=512, cpu=512 if size < 64 else 32, quick=8)
    few = setup.pick(cuda=32, cpu=128 if size < 64 else 16, quick=4)
    images = torch.from_numpy(smooth(many, size)).permute(0, 3, 1, 2)
    here = images.to(setup.device)
    v1, v2 = torchvision.pillow(config, size), torchvision.tensor(config, size)
    counts = {"ours": many, REFERENCE: few, "torchvision, tensors": few}
    works: dict[str, Work] = {"ours": lambda: ours(config, here, generator)}
    if setup.device.type == "cpu":
        works["batched"], counts["batched"] = lambda: batched(config, here, generator), many
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = rounds(works, repeats=setup.repeats, device=setup.device, clock=time.thread_time)
        references: dict[str, Work] = {
            REFERENCE: lambda: [v1(to_pil_image(image)) for image in images[:few]],
            "torchvision, tensors": lambda: [v2(image) for image in images[:few]],
        }
        cpu = torch.device("cpu")
        times |= rounds(references, repeats=setup.repeats, device=cpu, clock=time.thread_time)
    finally:
        torch.set_num_threads(threads)
    us = {name: [t / counts[name] * 1e6 for t in seconds] for name, seconds in times.items()}
    speed, source = peak_bytes(setup.device)
    moved = 3 * size * size * (1 + 4)  # bytes read, floats written
    for name, values in us.items():
        on_device = name in works
        yield Row(
            bench="augmentation",
            name=f"{setting}, {size} px, {name}",
            unit="us a view",
            values=values,
            floor=moved / speed * 1e6 if on_device else None,
            floor_is=f"bytes in and out over bandwidth ({source})" if on_device else "",
            reference=REFERENCE,
            ratio=ratio(us[REFERENCE], values),
        )
