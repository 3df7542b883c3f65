"""Crafting images one by one: chosen as `dbd prepare` chooses them, perturbed batch by batch, each batch kept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from data_prep.plan import check_rate, choose_poisoned
from dbd_dist.craft.craft import Craft, Network, TrainingSet, Work
from dbd_dist.data.loaders import StreamedImages
from dbd_dist.runtime.checkpoint import load_state, save_state


@dataclass(frozen=True, kw_only=True)
class PerImage(Craft):
    """An attack that perturbs images of the target class, each for itself: the batches are shared by the ranks."""

    no_effect: ClassVar[tuple[str, ...]] = ("batch",)

    rate: float = 0.025
    """Share of all training images to poison; they come from the target class alone. `dbd prepare` needs the same."""
    batch: int = 128
    """Images that one worker perturbs at a time; each batch is kept, and not made again after a crash."""

    def __post_init__(self):
        super().__post_init__()
        check_rate(self.rate)

    @abstractmethod
    def perturb(
        self, network: Network, images_BCHW: Tensor, index_B: Tensor, tick: Callable[[int, int], None]
    ) -> tuple[Tensor, Tensor]:
        """Perturb one batch; the result for an image does not depend on the others.

        Args:
            network: takes float images in grey levels.
            images_BCHW: uint8, on the device.
            index_B: their numbers in the training set, for draws of their own.
            tick: called with (step, steps).

        Returns:
            uint8 (B, 3, H, W); and an int64 scalar, the first step that was not finite, 0 where all were.
        """

    def measure(self, network: Network, images_BCHW: Tensor, perturbed_BCHW: Tensor) -> dict[str, Tensor]:
        """Figures of each image, (B,); their means are the evidence."""
        delta = (perturbed_BCHW.float() - images_BCHW.float()).flatten(1)
        figures = {"mean_linf": delta.abs().amax(dim=1), "mean_l2": delta.norm(dim=1)}
        if self.network == "surrogate":
            for when, images in (("before", images_BCHW), ("after", perturbed_BCHW)):
                figures[f"surrogate_accuracy_{when}"] = network(images.float()).argmax(dim=1) == self.target
        return figures

    def chosen(self, data: TrainingSet) -> np.ndarray:
        """The images that will be poisoned, as `dbd prepare` draws them: int64 (m,), in order. A UserError where the
        target class has fewer than are asked for."""
        drawn = {"rate": self.rate, "target": self.target, "num_classes": data.num_classes, "seed": self.seed}
        return np.flatnonzero(choose_poisoned(data.labels, **drawn, eligible=data.labels == self.target))

    def check(self, data: TrainingSet) -> None:
        super().check(data)
        self.chosen(data)

    def disk_bytes(self, data: TrainingSet) -> int:
        """Every image in a part and once more in the artefact."""
        return 2 * len(self.chosen(data)) * (3 * data.image_px**2 + 32)

    def make(self, work: Work) -> None:
        world = work.world
        images = StreamedImages.open(work.data.dataset, world.device)
        parts = list(enumerate(torch.from_numpy(self.chosen(work.data)).split(self.batch)))
        mine = [(n, index) for n, index in parts[world.rank :: world.size] if not _part(work.folder, n).exists()]
        failed = torch.zeros((), dtype=torch.int64, device=world.device)
        for (number, index), pixels in zip(mine, images.batches([index for _, index in mine]), strict=True):

            def tick(step: int, steps: int, number: int = number) -> None:
                work.tick("perturb", number + 1, len(parts), step, steps)

            perturbed, failed = self.perturb(work.network, pixels, index, tick)
            if failed:
                break
            with torch.no_grad():
                figures = self.measure(work.network, pixels, perturbed)
            part = {"images": perturbed.permute(0, 2, 3, 1).contiguous(), **figures}
            save_state({name: values.cpu() for name, values in part.items()}, _part(work.folder, number))
        work.check_finite(self, failed)  # also waits for every rank

    def collect(self, data: TrainingSet, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        index = self.chosen(data)
        whole: dict[str, np.ndarray] = {}
        for number, start in enumerate(range(0, len(index), self.batch)):
            for name, values in load_state(_part(folder, number), needs=("images",)).items():
                part = values.numpy()
                into = whole.setdefault(name, np.empty((len(index), *part.shape[1:]), part.dtype))
                into[start : start + self.batch] = part
        images = whole.pop("images")
        means = {name: float(values.mean()) for name, values in whole.items()}
        return {"index": index, "images": images}, {"images": len(index), **means}

    def summary(self, evidence: Mapping[str, Any]) -> str:
        before, after = (evidence.get(f"surrogate_accuracy_{when}") for when in ("before", "after"))
        known = "" if before is None else f"; the surrogate knew {before:.1%} of them before, {after:.1%} after"
        return (
            f"{evidence['images']:,} images of the target class{known}\nmean difference in grey levels: largest "
            f"{evidence['mean_linf']:.1f}, length {evidence['mean_l2']:.1f}"
        )


def _part(folder: Path, number: int) -> Path:
    return folder / f"part_{number:06d}.pt"
