"""Attention distillation: the suspect model learns on clean images to look where its fine-tuned teacher looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.losses import attention_distance
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.feature_maps import layers, recorded
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes
from dbd_dist.stages.teacher import few_clean


@dataclass(frozen=True, kw_only=True)
class Distillation(Stage):
    """Cross-entropy on clean images plus `beta` times the distance of the attention maps of student and teacher after
    each of the backbone's resolutions (Li et al. 2021, arXiv 2101.05930, eq. 4)."""

    name: ClassVar[str] = "distillation"
    title: ClassVar[str] = "Attention distillation"
    reads: ClassVar[tuple[str, ...]] = ("model", "teacher")
    gives: ClassVar[tuple[str, ...]] = ("model",)
    evaluates: ClassVar[bool] = True
    on_clean: ClassVar[bool] = True

    epochs: int = 20
    batch: int = 64
    """Clean images a step over all workers."""
    lr: float = 0.01
    """Learning rate of SGD; the teacher's, as no source at hand names another."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 2.0
    """p of the attention maps, the sum of |activation|^p over channels."""
    beta: float = 500.0
    """Weight of the distance at each resolution; 500 to 1000 in the authors' code."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(
            self, self.name, epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0",
            power="> 0", beta=">= 0",
        )  # fmt: skip

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        return few_clean(cls(), stages)

    def check_network(self, model: ModelConfig) -> None:
        with torch.device("meta"):
            found = layers(model.build_backbone(), model.min_image_px)
        if not found:
            raise UserError(
                f"the backbone {model.backbone} has no feature maps to take attention from",
                where="model.backbone",
                expected="a convolutional network for this method",
            )

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = self._model(context, inputs["model"])
        teacher = self._model(context, inputs["teacher"]).eval().requires_grad_(False)
        distil(self, model, teacher, context, resume)
        return {"model": model.state_dict()}

    def _model(self, context: Context, weights: dict[str, Any]) -> Classifier:
        model = context.classifier(self.name, "weights")
        model.load_state_dict(weights)
        return context.prepare(model, compiled=False)  # its hooks would not be called in the order that they need

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def distil(
    config: Distillation,
    model: Classifier,
    teacher: Classifier,
    context: Context,
    resume: dict[str, Any] | None,
) -> None:
    """Train `model` in place; the teacher is in eval mode and does not change."""
    world, clean, mine = context.world, context.clean, context.mine(config.batch)
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    restore(resume, model, optimizer)
    network = world.data_parallel(model)
    side = next(iter(clean.batches([torch.zeros(1, dtype=torch.int64)]))).shape[-1]
    names = layers(teacher.backbone, side)

    def one(epoch: int, loop: EpochLoop) -> None:
        order = epoch_batches(len(clean), config.batch, context.generator(config.name, epoch, "order"))
        chosen = order[loop.done :, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        network.train()
        with recorded(model.backbone, names) as seen, recorded(teacher.backbone, names) as wanted:
            for pixels, positions in zip(loop.steps(clean.batches(chosen), len(order)), here):
                height, width = pixels.shape[2:]
                params = augment.draw(config.augment, config.batch, height=height, width=width, generator=loop.draws)
                views = augment.apply(config.augment, pixels, params[mine])
                with context.autocast():
                    with torch.no_grad():
                        teacher(views)
                    logits = network(views)
                supervised = F.cross_entropy(logits.float(), clean.labels[positions])
                distances = [attention_distance(seen[name], wanted[name], config.power) for name in names]
                distance = torch.stack(distances).sum()
                loss = supervised + config.beta * distance
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loop.add(config.batch, loss=loss, loss_labelled=supervised, attention=distance)

    run_epochs(config, model, optimizer, context, resume, one)
