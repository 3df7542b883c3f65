"""The table of largest differences in docs/method.md: every component against its reference.

    python -m tests.benchmarks.numerics

The references are the formulas of the papers in plain loops (those of the tests), and torchvision, torch and Pillow.
Grey levels are those of 8 bits, 0-255. A few seconds on one core.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dbd_dist"))  # where the tests find their helpers

from data_prep.attacks import AdapBlend, AdapPatch, BadNets, Ctrl, WaNet, blended, sig
from data_prep.attacks.wanet import warp_positions
from dbd_dist.craft import pgd
from dbd_dist.craft.adaptive import distances
from dbd_dist.data import augment
from dbd_dist.distributed.world import World
from dbd_dist.losses import nt_xent, symmetric_cross_entropy
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, seeded
from dbd_dist.stages.mixmatch import mixmatch_losses
from tests.data_prep.attacks.test_ctrl import formula as ctrl_formula
from tests.dbd_dist.test_augment import STILL, one_by_one, random_images
from tests.dbd_dist.test_augment import draw as draw_params
from tests.dbd_dist.test_craft import slow_distances, slow_pgd
from tests.dbd_dist.test_evaluate import measured_and_counted
from tests.dbd_dist.test_losses import nt_xent_loop, softmax
from tests.dbd_dist.test_speed import lars_both_ways
from tests.dbd_dist.test_stages import mixmatch_loop

Row = tuple[str, str, float, str]
"""Component, reference, largest difference, its unit."""
GREY, RELATIVE = "grey levels", "relative"


def noise_images(count: int, px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, px, px, 3), dtype=np.uint8)


def relative(found: float, wanted: float) -> float:
    return abs(found - wanted) / abs(wanted)


@functools.cache
def _mixtures(alpha: float) -> np.ndarray:
    share = Fraction(repr(alpha))
    return np.array(
        [[int((1 - share) * a + share * b + Fraction(1, 2)) for b in range(256)] for a in range(256)], dtype=np.int64
    )


def mixed_exactly(x: np.ndarray, p: np.ndarray, alpha: float) -> np.ndarray:
    """(1 - alpha) x + alpha p in rational numbers, rounded halves up."""
    return _mixtures(alpha)[x.astype(int), p.astype(int)]


# -- attacks


def of_badnets() -> float:
    images = noise_images(4, 32)
    wanted = images.copy()
    for y in range(3):
        for x in range(3):
            wanted[:, 28 + y, 28 + x] = 255 if (x + y) % 2 == 0 else 0
    return float(np.abs(BadNets().train_trigger(32)(images, np.arange(4)).astype(int) - wanted).max())


def of_blended() -> float:
    x, p = noise_images(4, 64), noise_images(1, 64, seed=1)[0]
    return float(max(np.abs(blended(x, p, a) - mixed_exactly(x, np.broadcast_to(p, x.shape), a)).max()
                     for a in (0.1, 0.15, 0.2)))  # fmt: skip


def of_wanet() -> float:
    """Torch's bicubic field and bilinear sampling in float64, trigger and noise sample, at three sizes."""
    worst = 0.0
    for px in (32, 64, 224):
        images, attack, index = noise_images(1, px), WaNet(), np.array([5])
        vectors = np.random.default_rng(0).uniform(-1, 1, size=(2, 4, 4))
        vectors /= np.abs(vectors).mean()
        field = F.interpolate(torch.from_numpy(vectors)[None], size=px, mode="bicubic", align_corners=True)[0]
        line = torch.linspace(-1, 1, px, dtype=torch.float64)
        identity = torch.stack([*reversed(torch.meshgrid(line, line, indexing="ij"))])
        strength = 0.5 * px / 32
        noise = torch.from_numpy(np.random.default_rng([0, 5]).uniform(-1, 1, (2, px, px))) * (strength / 0.5 / px)
        clean = torch.from_numpy(images).double().permute(0, 3, 1, 2)
        warped = (identity + field * (strength / px)).clamp(-1, 1)
        for trigger, at in (
            (attack.train_trigger(px), warped),
            (attack.cover_trigger(px), (warped + noise).clamp(-1, 1)),
        ):
            wanted = F.grid_sample(clean, at.permute(1, 2, 0)[None], mode="bilinear", align_corners=True)
            made = trigger(images, index)[0]
            worst = max(worst, float(np.abs(made - wanted[0].permute(1, 2, 0).numpy()).max()))
    return worst


def of_sig() -> float:
    images, worst = noise_images(2, 32), 0.0
    for delta in (20.0, 40.0):
        wave = np.array([delta * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)])
        wanted = np.clip(images + wave[None, None, :, None], 0, 255)
        worst = max(worst, float(np.abs(sig(images, delta, 6.0) - wanted).max()))
    return worst


def of_adap_blend() -> float:
    """8 of 16 parts, and the whole pattern at test time."""
    images, attack = noise_images(8, 32), AdapBlend()
    pattern = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    made = attack.train_trigger(32)(images, np.arange(8)).astype(int)
    whole = mixed_exactly(images, np.broadcast_to(pattern, images.shape), 0.15)
    worst = 0.0
    for i in range(8):
        parts = [(slice(8 * r, 8 * r + 8), slice(8 * c, 8 * c + 8)) for r in range(4) for c in range(4)]
        from_whole = [np.abs(made[i][part] - whole[i][part]).max() for part in parts]
        untouched = [np.abs(made[i][part] - images[i][part].astype(int)).max() for part in parts]
        shown = sorted(range(16), key=lambda k: from_whole[k])[:8]
        worst = max([worst, *(float(from_whole[k] if k in shown else untouched[k]) for k in range(16))])
    test = attack.test_trigger(32)(images, np.arange(8))
    return max(worst, float(np.abs(test - mixed_exactly(images, np.broadcast_to(pattern, images.shape), 0.2)).max()))


def of_adap_patch() -> float:
    images, attack, worst = noise_images(1, 32), AdapPatch(), 0.0
    for index in range(8):
        made = attack.train_trigger(32)(images, np.array([index]))[0].astype(int)
        options = []
        for (patch, row, col), alpha in zip(attack.patches(32), (0.5, 0.2, 0.5, 0.3)):
            wanted = images[0].astype(int)
            area = (slice(row, row + len(patch)), slice(col, col + len(patch)))
            wanted[area] = mixed_exactly(images[0][area], patch, alpha)
            options.append(float(np.abs(made - wanted).max()))
        worst = max(worst, min(options))
    return worst


def of_ctrl() -> float:
    image = noise_images(1, 64)
    attack = Ctrl()
    return max(
        float(np.abs(trigger(64)(image, np.arange(1))[0] - ctrl_formula(image[0], 32, (15, 31), magnitude)).max())
        for trigger, magnitude in ((attack.train_trigger, 50.0), (attack.test_trigger, 100.0))
    )


def of_label_consistent() -> float:
    """PGD against a linear classifier, whose gradient is written down; L-inf 8, step 1.5, from zero."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(4, 3 * 8 * 8)) / 50, rng.normal(size=4)
    pixels = torch.from_numpy(rng.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8))
    size: dict = {"norm": "linf", "eps": 8.0, "step": 1.5, "steps": 100}
    made, _ = pgd.perturb(
        lambda x: x.flatten(1) @ torch.from_numpy(weight).T + torch.from_numpy(bias),
        pixels, torch.arange(4), torch.zeros(pixels.shape, dtype=torch.float64), **size,
    )  # fmt: skip
    wanted = [slow_pgd(weight, bias, x.flatten().numpy(), i, np.zeros(192), **size) for i, x in enumerate(pixels)]
    return float(np.abs(made.flatten(1).numpy() - np.round(wanted)).max())


def of_adaptive() -> float:
    rng = np.random.default_rng(0)
    features, centres = rng.normal(size=(32, 64)), rng.normal(size=(10, 64))
    worst = 0.0
    for kind in ("l2", "cosine"):
        found = distances(torch.from_numpy(features).float(), torch.from_numpy(centres).float(), kind)
        worst = max(worst, *(relative(f.item(), w) for f, w in zip(found, slow_distances(features, centres, kind))))
    return worst


# -- losses, optimiser, network


def of_nt_xent() -> float:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(32, 128, generator=generator) for _ in range(2))
    return max(
        relative(nt_xent(first, second, t, World(), symmetric=s).item(), nt_xent_loop(first, second, t, s))
        for t in (0.5, 0.1)
        for s in (True, False)
    )


def of_nt_xent_gradient() -> float:
    """Float64 and autograd on equation 1, written with an explicit sum."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(32, 128, generator=generator) for _ in range(2))
    ours = first.clone().requires_grad_()
    nt_xent(ours, second, 0.5, World()).backward()
    theirs = first.double().requires_grad_()
    z = torch.cat([theirs, second.double()])
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    e = torch.exp(z @ z.T / 0.5) * (1 - torch.eye(64))
    positive = e[torch.arange(64), (torch.arange(64) + 32) % 64]
    (-(positive / e.sum(dim=1)).log().mean()).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    return float((ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max())


def of_sce() -> float:
    logits = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)) * 8
    labels = torch.arange(64) % 10
    worst = 0.0
    found = symmetric_cross_entropy(logits, labels, 0.1, 1.0).tolist()
    for row, label, value in zip(logits.double().tolist(), labels.tolist(), found):
        p = softmax(row)
        reverse = -sum(min(max(q, 1e-7), 1.0) * math.log(1.0 if k == label else 1e-4) for k, q in enumerate(p))
        worst = max(worst, relative(value, 0.1 * -math.log(p[label]) + reverse))
    return worst


def of_mixmatch() -> float:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 5)
    first, second, third = (torch.randn(16, 3, 4, 4, generator=generator) for _ in range(3))
    given = F.one_hot(torch.arange(16) % 10, 10).float()
    fixed = {"temperature": 0.5, "mix": 0.7, "order": torch.randperm(48, generator=generator), "lambda_u": 15.0}
    with torch.no_grad():
        classifier: Classifier = model  # type: ignore[assignment]
        found = mixmatch_losses(model, classifier, (first, second, third), given, **fixed, world=World())
        double = (first.double(), second.double(), third.double())
        wanted, _ = mixmatch_loop(model.double(), double, given.double(), **fixed)
    return max(relative(f.item(), w) for f, w in zip(found, wanted))


def of_lars() -> float:
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in lars_both_ways(torch.float32, 20)
    )


def of_resnet() -> float:
    """Logits, training and evaluation mode, with torchvision's weights."""
    theirs = seeded(lambda: torchvision.models.resnet18(num_classes=10), torch.Generator().manual_seed(1))
    ours = Classifier(ModelConfig(stem="imagenet"), 10)
    weights = theirs.state_dict()
    ours.head.load_state_dict({key: weights.pop(f"fc.{key}") for key in ("weight", "bias")})
    ours.backbone.load_state_dict(weights)
    batch, worst = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)), 0.0
    with torch.no_grad():
        for mode in (True, False):
            a, b = ours.train(mode)(batch), theirs.train(mode)(batch)
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


# -- augmentation, measures


def of_augmentation(config: augment.AugmentConfig, px: int) -> float:
    still = {"mean": STILL.mean, "std": STILL.std}
    shown = augment.AugmentConfig(**{**config.__dict__, **still})
    images = random_images(8 if px < 100 else 4, px, px)
    params = draw_params(shown, images)
    return float((augment.apply(shown, images, params) - one_by_one(shown, images, params)).abs().max() * 255)


def of_asr() -> float:
    with tempfile.TemporaryDirectory() as folder:
        measured, counted, _ = measured_and_counted("all-to-one", Path(folder))
    return max(abs(getattr(measured, name) - share) for name, share in counted.items())


def of_full_blur() -> float:
    """Pillow's Gaussian (three box blurs on bytes), sigma 2, on smooth images, away from the edges."""
    config = augment.AugmentConfig(**{**STILL.__dict__, "blur_p": 1.0, "blur_sigma": (2.0, 2.0), "blur_kernel": "full"})
    coarse = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images: Tensor = (F.interpolate(coarse, size=32, mode="bilinear") * 255).byte()
    ours = augment.apply(config, images, draw_params(config, images)) * 255
    worst = 0.0
    for image, made in zip(images, ours):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(2.0))
        difference = made.permute(1, 2, 0).numpy() - np.asarray(theirs, dtype=float)
        worst = max(worst, float(np.abs(difference[6:-6, 6:-6]).max()))
    return worst


def of_noise_ratio() -> float:
    """Displacement of a noise sample from the trigger over the trigger's own, against that of 32 px."""
    ratios = []
    for px in (32, 64, 224):
        field, strength = WaNet().field(px)
        trigger = warp_positions(field, strength)
        noise = np.random.default_rng(1).uniform(-1, 1, field.shape)
        moved = warp_positions(field, strength, noise) - trigger
        own = trigger - np.mgrid[:px, :px][::-1]
        ratios.append(math.sqrt((moved**2).mean() / (own**2).mean()))
    return max(abs(r / ratios[0] - 1) for r in ratios)


MEASURED: tuple[tuple[str, str, Callable[[], float], str], ...] = (
    ("BadNets, default patch", "drawn pixel by pixel", of_badnets, GREY),
    ("Blended", "(1 - a) x + a p in rational numbers, rounded", of_blended, GREY),
    ("WaNet, trigger and noise samples", "torch: bicubic field, `grid_sample`, float64, not rounded", of_wanet, GREY),
    ("WaNet, noise over trigger", "the same ratio at 32 px, for 64 and 224 px", of_noise_ratio, RELATIVE),
    ("SIG", "delta sin(2 pi j f / W), float64, not rounded", of_sig, GREY),
    ("Adap-Blend", "8 of 16 parts in rational numbers, rounded", of_adap_blend, GREY),
    ("Adap-Patch", "one of four patches in rational numbers, rounded", of_adap_patch, GREY),
    ("CTRL", "YUV, cosine transform and back, float64, not rounded", of_ctrl, GREY),
    ("label-consistent (PGD)", "loop with the gradient by hand, float64, rounded", of_label_consistent, GREY),
    ("adaptive (objective)", "loop over distances, float64", of_adaptive, RELATIVE),
    ("NT-Xent", "SimCLR eq. 1 in loops, float64", of_nt_xent, RELATIVE),
    ("NT-Xent, gradient", "autograd of eq. 1, float64", of_nt_xent_gradient, RELATIVE),
    ("SCE", "0.1 CE + RCE with its clamps, loops, float64", of_sce, RELATIVE),
    ("MixMatch", "eq. 3 to 11 in loops, float64", of_mixmatch, RELATIVE),
    ("LARS, 20 steps", "algorithm 1 in loops, float64", of_lars, RELATIVE),
    ("ResNet-18, logits", "torchvision with equal weights, float32", of_resnet, RELATIVE),
    ("SimCLR augmentation, 32 px", "torchvision, float64", lambda: of_augmentation(augment.simclr(), 32), GREY),
    ("SimCLR augmentation, 224 px", "torchvision, float64", lambda: of_augmentation(augment.simclr(), 224), GREY),
    ("weak augmentation, 32 px", "torchvision, float64", lambda: of_augmentation(augment.weak_pad(), 32), GREY),
    ("blur of the released presets", "Pillow on bytes, sigma 2", of_full_blur, GREY),
    ("ASR, robust and clean accuracy", "counted image by image", of_asr, "of 1"),
)


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    for component, reference, measure, unit in MEASURED:
        yield component, reference, measure(), unit


def line(row: Row) -> str:
    component, reference, difference, unit = row
    shown = f"{difference:.1e} {unit}" if difference else "0"
    return f"| {component} | {reference} | {shown} |"


if __name__ == "__main__":
    print("| component | reference | largest difference |\n|---|---|---|")
    for row in rows():
        print(line(row), flush=True)
