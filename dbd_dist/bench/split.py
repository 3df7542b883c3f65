"""The filter's pass over the data: every sample once, forward only."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dbd_dist.bench.floor import flops, peak_flops
from dbd_dist.bench.row import Row, Setup
from dbd_dist.bench.step import CLASSES, PX, make_context, network_for
from dbd_dist.bench.timing import rounds
from dbd_dist.models.heads import Classifier
from dbd_dist.stages import Split, Warmup
from dbd_dist.stages.split import measure_losses


def measure(setup: Setup) -> Iterator[Row]:
    count = setup.pick(cuda=20480, cpu=64, quick=16)
    context = make_context(setup, count)
    model = context.prepare(Classifier(network_for(setup), CLASSES))
    config, sample_loss = Split(), Warmup().offers()["sample_loss"]
    sample = torch.zeros(2, 3, PX, PX, device=setup.device).to(memory_format=torch.channels_last)
    model.eval()
    with torch.no_grad():
        each = flops(lambda: model(sample)) / len(sample)
    peak, source = peak_flops(setup.device, setup.bf16, setup.threads)
    works = {"pass": lambda: measure_losses(config, sample_loss, model, context, 1)}
    times = rounds(works, repeats=setup.repeats, device=setup.device, clock=setup.clock)
    values = [t / count * 1e6 for t in times["pass"]]
    yield Row(
        bench="split",
        name=f"filter pass, ResNet-18, {count} images, {setup.precision}",
        unit="us an image",
        values=values,
        floor=each / peak * 1e6,
        floor_is=f"{each / 1e9:.2f} GFLOP over {peak / 1e12:.3g} TFLOP/s ({source})",
        notes={"images_per_s": 1e6 / sorted(values)[len(values) // 2]},
    )
