"""CPU time of one augmented view, ours beside torchvision's per-image pipelines, all in one thread.

    python -m tests.benchmarks.augment [--json FILE] [--repeats 9] [--sizes 16 32 224]

Every repeat times all pipelines one after the other, so that a busy neighbour slows each of them; ratios are
taken within a repeat. Ours includes the drawing of the parameters. "batched" is the form that other devices
run, here on the CPU. Inputs are uint8 images in memory; no pipeline reads or decodes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from dbd_dist import augment
from dbd_dist.augment import AugmentConfig
from dbd_dist.augment.batched import apply_batched, make_plan

SETTINGS: dict[str, Callable[[int], AugmentConfig]] = {
    "simclr": lambda size: augment.simclr(),
    "simclr, no blur": lambda size: augment.simclr(blur_p=0.0),
    "weak": lambda size: augment.weak_pad() if size < 64 else augment.weak_resized(),
}


def torchvision_v1(config: AugmentConfig, size: int) -> Callable[[Tensor], Tensor]:
    """From bytes through a Pillow image to the normalised tensor, as image folders are usually augmented."""
    steps: list = [v1.ToPILImage(), *_crop_and_flip(v1, config, size), *_colours(v1, config, size)]
    return v1.Compose([*steps, v1.ToTensor(), v1.Normalize(config.mean, config.std)])


def torchvision_v2(config: AugmentConfig, size: int) -> Callable[[Tensor], Tensor]:
    """The same on uint8 tensors."""
    steps: list = [*_crop_and_flip(v2, config, size), *_colours(v2, config, size)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)])


def _crop_and_flip(t, config: AugmentConfig, size: int) -> list:
    mode = InterpolationMode(config.interpolation)
    if config.crop == "pad":
        crop = t.RandomCrop(size, padding=config.pad_px, padding_mode="reflect")
    else:
        crop = t.RandomResizedCrop(size, scale=config.scale, ratio=config.ratio, interpolation=mode)
    return [crop, t.RandomHorizontalFlip(config.flip_p)]


def _colours(t, config: AugmentConfig, size: int) -> list:
    steps = []
    if config.jitter_p:
        steps.append(t.RandomApply([t.ColorJitter(*config.jitter)], p=config.jitter_p))
    if config.grayscale_p:
        steps.append(t.RandomGrayscale(p=config.grayscale_p))
    if config.blur_p:
        blur = t.GaussianBlur(augment.blur_kernel_px(size, size), sigma=config.blur_sigma)
        steps.append(t.RandomApply([blur], p=config.blur_p))
    return steps


def ours(config: AugmentConfig, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images_BCHW.shape
    params = augment.draw(config, count, height=height, width=width, generator=generator)
    return augment.apply(config, images_BCHW, params)


def batched(config: AugmentConfig, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images_BCHW.shape
    params = augment.draw(config, count, height=height, width=width, generator=generator)
    plan = make_plan(params, images_BCHW.device)
    return apply_batched(config, images_BCHW.permute(0, 2, 3, 1), plan)


def measure(setting: str, size: int, repeats: int) -> dict:
    """Microseconds a view of every pipeline: median, least and most over the repeats."""
    config = SETTINGS[setting](size)
    generator = torch.Generator().manual_seed(0)
    many, few = (512, 128) if size < 64 else (32, 16)
    coarse = torch.rand(many, 3, 8, 8, generator=generator)  # smooth, like photographs
    images = (torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1) * 255).byte()
    images_BCHW = images.contiguous(memory_format=torch.channels_last)
    reference, other = torchvision_v1(config, size), torchvision_v2(config, size)
    pipelines: dict[str, tuple[int, Callable[[], object]]] = {
        "ours": (many, lambda: ours(config, images_BCHW, generator)),
        "batched": (many, lambda: batched(config, images_BCHW, generator)),
        "torchvision v1 (Pillow)": (few, lambda: [reference(image) for image in images[:few]]),
        "torchvision v2 (tensor)": (few, lambda: [other(image) for image in images[:few]]),
    }
    times_us: dict[str, list[float]] = {name: [] for name in pipelines}
    for repeat in range(repeats + 1):  # the first, which also compiles, is not counted
        for name, (count, run) in pipelines.items():
            start_s = time.thread_time()  # without the time that other processes had the core
            run()
            if repeat:
                times_us[name].append((time.thread_time() - start_s) / count * 1e6)
    v1_us = times_us["torchvision v1 (Pillow)"]
    return {
        "setting": setting,
        "size_px": size,
        "us_per_view": {
            name: {"median": median(times), "least": min(times), "most": max(times)} for name, times in times_us.items()
        },
        "times_faster_than_v1": median(theirs / mine for theirs, mine in zip(v1_us, times_us["ours"])),
    }


def first_call_s() -> float:
    """Seconds of the first call in a process: importing Numba, then compiling or loading what is cached."""
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    start_s = time.perf_counter()
    ours(augment.simclr(), images, torch.Generator())
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 224], help="image sizes in pixels")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": Image.__version__,
    }
    first_s = first_call_s()
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"first call in this process: {first_s:.1f} s")
    print(f"\nCPU us a view, one thread, median of {arguments.repeats} (least - most)\n")
    rows = []
    for size in arguments.sizes:
        for setting in SETTINGS:
            row = measure(setting, size, arguments.repeats)
            if not rows:
                columns = list(row["us_per_view"])
                print("| px | setting | " + " | ".join(columns) + " | times faster than v1 |")
                print("|---" * (len(columns) + 3) + "|")
            cells = [f"{t['median']:.1f} ({t['least']:.1f} - {t['most']:.1f})" for t in row["us_per_view"].values()]
            print(
                f"| {size} | {setting} | " + " | ".join(cells) + f" | {row['times_faster_than_v1']:.1f} |",
                flush=True,
            )
            rows.append(row)
    if arguments.json:
        result = {"versions": versions, "machine": platform.machine(), "first_call_s": first_s, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
