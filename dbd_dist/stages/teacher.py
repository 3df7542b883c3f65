"""The teacher of Neural Attention Distillation: the suspect model, fine-tuned on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch.nn.functional as F

from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.sampling import epoch_batches
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.epoch_loop import EpochLoop, restore, run_epochs
from dbd_dist.stages.stage import NetworkBytes, Stage, StageBytes, find_stage
from dbd_dist.stages.supervised import Supervised

Tuned = TypeVar("Tuned", bound=Any)


@dataclass(frozen=True, kw_only=True)
class Teacher(Stage):
    """Fine-tune the model on the clean images: 10 epochs with learning rate 0.01 (Li et al. 2021)."""

    name: ClassVar[str] = "teacher"
    title: ClassVar[str] = "Fine-tuning on clean images"
    reads: ClassVar[tuple[str, ...]] = ("model",)
    gives: ClassVar[tuple[str, ...]] = ("teacher",)
    on_clean: ClassVar[bool] = True

    epochs: int = 10
    batch: int = 64
    """Clean images a step over all workers."""
    lr: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augment: AugmentConfig = field(default_factory=augment.weak_pad)

    def __post_init__(self):
        require(self, self.name, epochs=">= 1", batch=">= 2", lr="> 0", momentum="in [0, 1)", weight_decay=">= 0")

    @classmethod
    def from_preset(cls, stages: Mapping[str, Stage]) -> Stage | None:
        return few_clean(cls(), stages)

    def run(self, context: Context, inputs: Mapping[str, Any], resume: dict[str, Any] | None) -> dict[str, Any]:
        model = context.classifier(self.name, "weights")
        model.load_state_dict(inputs["model"])
        model = context.prepare(model)
        fine_tune(self, model, context, resume)
        return {"teacher": model.state_dict()}

    def sizes(self, networks: NetworkBytes) -> StageBytes:
        return StageBytes(checkpoint=2 * networks.classifier, kept=networks.classifier)


def few_clean(own: Tuned, stages: Mapping[str, Stage]) -> Tuned | None:
    """A stage on the clean images with the augmentation of a preset's plain training, no more epochs, and half its
    batch at most, since clean images are few; None where the preset has no plain training."""
    plain = find_stage(tuple(stages.values()), Supervised)
    if plain is None:
        return None
    epochs, batch = min(own.epochs, plain.epochs), min(own.batch, max(plain.batch // 2, 2))
    return replace(own, epochs=epochs, batch=batch, augment=plain.augment)


def fine_tune(config: Teacher, model: Classifier, context: Context, resume: dict[str, Any] | None) -> None:
    """Train `model` in place, on the clean images."""
    world, clean, mine = context.world, context.clean, context.mine(config.batch)
    optimizer = optim.sgd(model.parameters(), config.lr, config.momentum, config.weight_decay)
    restore(resume, model, optimizer)
    network = world.data_parallel(model)

    def one(epoch: int, loop: EpochLoop) -> None:
        order = epoch_batches(len(clean), config.batch, context.generator(config.name, epoch, "order"))
        chosen = order[loop.done :, mine]
        here = chosen.to(world.device)  # once an epoch: a copy in a step would wait for the device
        network.train()
        for pixels, positions in zip(loop.steps(clean.batches(chosen), len(order)), here):
            height, width = pixels.shape[2:]
            params = augment.draw(config.augment, config.batch, height=height, width=width, generator=loop.draws)
            with context.autocast():
                logits = network(augment.apply(config.augment, pixels, params[mine]))
            loss = F.cross_entropy(logits.float(), clean.labels[positions])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loop.add(config.batch, loss=loss)

    run_epochs(config, model, optimizer, context, resume, one)
