"""Crafting one trigger for all images: a pattern, and its share at each pixel, optimised on what a network makes of
stamped images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.craft.craft import Craft, Network, TrainingSet, Work
from dbd_dist.data.loaders import Images, open_images
from dbd_dist.data.sampling import cycling_batches, rank_slice
from dbd_dist.fields import require
from dbd_dist.runtime.checkpoint import load_state, save_state

CHECKPOINT_STEPS = 50
EVIDENCE_IMAGES = 2000
FORWARD_BATCH = 500
RESIDENT_GIB = 16.0
STATE, RESULT = "state.pt", "result.pt"


@dataclass(frozen=True, kw_only=True)
class OptimisedTrigger(Craft):
    """An attack that optimises a pattern, and perhaps its mask, by gradient descent over steps that all ranks share."""

    optimise: Literal["pattern", "pattern-and-mask"] = "pattern"
    """pattern: the mask is fixed by alpha and patch-px. pattern-and-mask: the mask too, under mask-budget."""
    alpha: float | None = None
    """Share of the pattern within a fixed mask. Default: 0.1 over a whole image, 1 within a patch."""
    patch_px: int | None = None
    """Side of a fixed mask's square; without it the mask is the whole image."""
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right"] = "bottom-right"
    """Where the square sits."""
    mask_budget: float = 0.1
    """What the mean of an optimised mask is kept at or below."""
    steps: int = 500
    """Steps of Adam."""
    lr: float = 0.1
    """Learning rate of Adam, on the logits of pattern and mask."""
    batch: int = 128
    """Images a step over all workers, drawn from the training images that may be poisoned."""

    def __post_init__(self):
        super().__post_init__()
        require(self, "craft", alpha="in (0, 1]", patch_px=">= 1", mask_budget="in (0, 1]", steps=">= 1", lr="> 0",
                batch=">= 2")  # fmt: skip
        if self.alpha is not None and self.alpha * 255 < 0.5:
            what = f"{self.alpha!r} changes no pixel: masks have steps of 1/255"
            raise UserError(what, where="craft.alpha", expected="0.002 to 1")
        if self.optimise == "pattern-and-mask" and (self.alpha is not None or self.patch_px is not None):
            what, where = (
                "alpha and patch_px describe a fixed mask, and this one is optimised",
                "craft.alpha, craft.patch_px",
            )
            raise UserError(what, where=where, expected="mask_budget, or optimise pattern")

    def outputs(self, network: Network, grey_BCHW: Tensor) -> Tensor:
        """What `terms` are computed from: float (B, D), of float images in grey levels."""
        return network(grey_BCHW)

    @abstractmethod
    def reference(self, network: Network, images: Images, work: Work) -> Tensor:
        """What stamped images are compared with, computed once; the same on every rank."""

    @abstractmethod
    def terms(self, outputs_BD: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """Scalars by name, of `outputs` of a whole batch: "objective" is minimised, and all are evidence."""

    def eligible(self, labels: Any) -> Any:
        """Which images the trigger is for, as `dbd prepare` chooses among them: bool (n,) for int (n,) labels."""
        return labels == self.target if self.attack.clean_label else labels != self.target

    def check(self, data: TrainingSet) -> None:
        super().check(data)
        if self.optimise == "pattern":
            fixed_mask(self, data.image_px)
        if not self.eligible(data.labels).any():
            raise UserError("there are no images that could be poisoned", where=data.dataset.folder)

    def check_workers(self, workers: int) -> None:
        if self.batch % workers:
            what = f"a batch of {self.batch} cannot be shared equally by {workers} workers"
            raise UserError(what, where="craft.batch", expected=f"a multiple of {workers}")

    def disk_bytes(self, data: TrainingSet) -> int:
        """Pattern, mask and Adam's two values of each in float32, kept and being written; pattern and mask in uint8 as
        result and in the artefact."""
        pixels = data.image_px**2
        return 2 * 3 * 4 * pixels * 4 + 2 * 4 * pixels

    def make(self, work: Work) -> None:
        world, result = work.world, work.folder / RESULT
        if world.broadcast(result.exists()):
            return
        images = open_images(work.data.dataset, world.device, resident_gib=RESIDENT_GIB)
        reference = self.reference(work.network, images, work)
        trigger = Trigger(self, work.data.image_px).to(world.device)
        eligible = torch.nonzero(self.eligible(images.labels.cpu())).flatten()
        drawn = torch.randperm(len(eligible), generator=seeds.generator(self.seed, self.name, "evidence"))
        fixed = eligible[drawn[:EVIDENCE_IMAGES]].sort().values
        evidence: dict[str, Any] = {"images": len(fixed)}
        evidence["before"] = self._measure(trigger, reference, images, fixed, work)
        order = cycling_batches(eligible, self.steps, self.batch, seeds.generator(self.seed, self.name, "order"))
        self._optimise(trigger, reference, images, order, work)
        evidence["after"] = self._measure(trigger, reference, images, fixed, work)
        pattern, mask = (values.cpu() for values in trigger.quantised())
        evidence["mask_mean"] = float(mask.float().mean()) / 255
        if world.is_main:
            pattern = pattern.permute(1, 2, 0).contiguous()
            save_state({"pattern": pattern, "mask": mask, "evidence": evidence}, result)
        world.barrier()

    def _optimise(self, trigger: Trigger, reference: Tensor, images: Images, order: Tensor, work: Work) -> None:
        """Adam on the trigger's logits, in place, from the newest checkpoint. Every rank takes its part of each batch;
        `order` holds positions of images, int64 (steps, batch)."""
        world, path, parameters = work.world, work.folder / STATE, list(trigger.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        done = 0
        if world.broadcast(path.exists()):
            state = load_state(path, needs=("step", "trigger", "optimizer"))
            world.barrier()  # rank 0 replaces the file once it resumes
            done = state["step"]
            trigger.load_state_dict(state["trigger"])
            optimizer.load_state_dict(state["optimizer"])
        mine = rank_slice(self.batch, world.rank, world.size)
        failed = torch.zeros((), dtype=torch.int64, device=world.device)
        for step, pixels in enumerate(images.batches(order[done:, mine]), start=done + 1):
            outputs = self.outputs(work.network, stamp(pixels.float(), *trigger()))
            # every rank scores the whole batch, so that the mean over ranks is the whole batch's gradient
            objective = self.terms(world.gather_with_grad(outputs), reference)["objective"]
            optimizer.zero_grad()
            objective.backward()
            finite = objective.detach().isfinite()
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad = world.mean(parameter.grad)
                finite = finite & parameter.grad.isfinite().all()
            failed = torch.where((failed == 0) & ~finite, step, failed)
            optimizer.step()
            work.tick("optimise", 1, 1, step, self.steps)
            if step % CHECKPOINT_STEPS == 0 or step == self.steps:
                work.check_finite(self, failed)
                if world.is_main:
                    work.note({"loss": float(objective.detach())})
                    state = {"step": step, "trigger": trigger.state_dict(), "optimizer": optimizer.state_dict()}
                    save_state(state, path)

    @torch.no_grad()
    def _measure(
        self, trigger: Trigger, reference: Tensor, images: Images, positions: Tensor, work: Work
    ) -> dict[str, float]:
        """The terms of the trigger as it will be applied, on the images at `positions`."""
        mine = positions[rank_slice(len(positions), work.world.rank, work.world.size)]
        chunks = list((mine if len(mine) else positions[:1]).split(FORWARD_BATCH))  # of no image the width is not known
        applied = trigger.quantised()
        stamped = (stamp_quantised(pixels, *applied) for pixels in images.batches(chunks))
        parts = [self.outputs(work.network, pixels.float()) for pixels in stamped]
        outputs = work.world.gather(torch.cat(parts)[: len(mine)])
        return {name: float(value) for name, value in self.terms(outputs, reference).items()}

    def collect(self, data: TrainingSet, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        result = load_state(folder / RESULT, needs=("pattern", "mask", "evidence"))
        return {name: result[name].numpy() for name in ("pattern", "mask")}, result["evidence"]

    def summary(self, evidence: Mapping[str, Any]) -> str:
        lines = [f"{'':<29}{'before':>9}{'after':>9}   over {evidence['images']:,} images outside the target class"]
        for name, before in evidence["before"].items():
            lines.append(f"{name.replace('_', ' '):<29}{before:>9.4f}{evidence['after'][name]:>9.4f}")
        return "\n".join(lines)


class Trigger(nn.Module):
    """Pattern and mask behind logits, so that an optimiser without bounds keeps both in 0-1."""

    def __init__(self, config: OptimisedTrigger, px: int):
        super().__init__()
        self._budget = config.mask_budget
        noise = torch.rand(3, px, px, generator=seeds.generator(config.seed, config.name, "pattern"))
        self.pattern = nn.Parameter(torch.logit(0.05 + 0.9 * noise))
        self.fixed: Tensor | None
        if config.optimise == "pattern":
            self.register_buffer("fixed", fixed_mask(config, px), persistent=False)
        else:
            self.register_buffer("fixed", None)
            level = torch.full((px, px), config.mask_budget)
            self.mask = nn.Parameter(torch.logit(level.clamp_max(0.95)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The pattern (3, H, W) and the mask (H, W), both in 0-1; an optimised mask's mean is within its budget."""
        if self.fixed is not None:
            return self.pattern.sigmoid(), self.fixed
        mask = self.mask.sigmoid()
        return self.pattern.sigmoid(), mask * (self._budget / mask.mean()).clamp_max(1)

    @torch.no_grad()
    def quantised(self) -> tuple[Tensor, Tensor]:
        """The same in 1/255, uint8; an optimised mask is rounded down, to stay within its budget."""
        pattern, mask = self()
        level = (mask * 255).round() if self.fixed is not None else (mask * 255).floor()
        return (pattern * 255).round().to(torch.uint8), level.to(torch.uint8)


def fixed_mask(config: OptimisedTrigger, px: int) -> Tensor:
    """A share of the pattern over the whole image, or over a square in a corner: (px, px).

    Raises:
        UserError: the square is larger than the image.
    """
    side = config.patch_px if config.patch_px is not None else px
    if side > px:
        what = f"a patch of {side} px is larger than the images of {px} px"
        raise UserError(what, where="craft.patch_px", expected=f"1 to {px}")
    mask = torch.zeros(px, px)
    rows = slice(0, side) if config.corner.startswith("top") else slice(px - side, px)
    columns = slice(0, side) if config.corner.endswith("left") else slice(px - side, px)
    mask[rows, columns] = config.alpha if config.alpha is not None else 0.1 if config.patch_px is None else 1.0
    return mask


def stamp(grey_BCHW: Tensor, pattern_CHW: Tensor, mask_HW: Tensor) -> Tensor:
    """x' = (1 - m) x + m p, of images in grey levels and a trigger in 0-1; differentiable."""
    return grey_BCHW + mask_HW * (pattern_CHW * 255 - grey_BCHW)


def stamp_quantised(images_BCHW: Tensor, pattern_CHW: Tensor, mask_HW: Tensor) -> Tensor:
    """The same with all of it in uint8, rounded to the nearest grey level, halves up."""
    share = mask_HW.to(torch.int32)
    mixed = (255 - share) * images_BCHW.to(torch.int32) + share * pattern_CHW.to(torch.int32)
    return ((2 * mixed + 255) // 510).to(torch.uint8)
