"""What every stage is given, and what it hands back after each epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.loaders import Images
from dbd_dist.data.sampling import rank_slice
from dbd_dist.distributed.world import World
from dbd_dist.models.config import ModelConfig
from dbd_dist.models.heads import Classifier, ContrastiveModel, seeded

Network = TypeVar("Network", bound=nn.Module)
OnBackbone = TypeVar("OnBackbone", ContrastiveModel, Classifier)

FORMS = 64
"""That torch.compile may make of the networks of a process."""


@dataclass(frozen=True, kw_only=True)
class EpochEnd:
    """An epoch is over: what it measured, and all that is needed to resume from here."""

    stage: str
    epoch: int
    """Counts from 1."""
    epochs: int
    metrics: dict[str, float]
    state: Callable[[], dict[str, Any]]
    """The stage's state, tensors and plain values, to be handed back to it as `resume`."""
    model: nn.Module
    kept: Tensor | None = None
    """The split in force, bool (N,), where there is one."""


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """A step inside an epoch is over."""

    stage: str
    epoch: int
    epochs: int
    step: int
    """Counts from 1."""
    steps: int
    state: Callable[[], dict[str, Any]]
    """As in `EpochEnd`, to resume after this step. Waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of a stage, the same for all of them."""

    world: World
    images: Images
    holdout: Images | None = None
    """Clean images with true labels, set aside before poisoning; there where the method `needs_clean`, else None."""
    num_classes: int
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network that stages build."""
    start: Mapping[str, Tensor] | None = None
    """Weights that every network's backbone starts from: those of --model.weights. Default: drawn."""
    normalise: AugmentConfig = field(default_factory=augment.none)
    """How images are normalised where they are not augmented, as in every stage of the run."""
    seed: int
    bf16: bool
    sync_bn: bool
    compile: bool = False
    """Compile the networks that `prepare` is given."""
    cuda_graphs: bool = False
    """Replay recorded steps where a stage can."""
    report: Callable[[EpochEnd], None]
    tick: Callable[[str, int, int, int, int], None] = field(default=lambda *_: None)
    """Called every step with (stage, epoch, epochs, step, steps); must not wait for the device."""
    after_step: Callable[[StepEnd], None] = field(default=lambda _: None)
    """Called after every step but an epoch's last, on every rank; may save a state, and may end the run."""

    def generator(self, *names: str | int) -> torch.Generator:
        return seeds.generator(self.seed, *names)

    @property
    def clean(self) -> Images:
        """The clean images, of a method that needs them: runs of such a method start with a `holdout` only."""
        assert self.holdout is not None
        return self.holdout

    def mine(self, batch: int) -> slice:
        """This rank's part of a global batch."""
        return rank_slice(batch, self.world.rank, self.world.size)

    def mine_of_chunks(self, batch: int, chunk: int) -> Tensor:
        """int64 (batch / size,): this rank's part of every chunk of a global batch, chunk by chunk.

        Each chunk's images are so the same for any number of ranks, and with them its batch-norm statistics.
        """
        part = self.mine(chunk)
        return torch.arange(batch).view(-1, chunk)[:, part].flatten()

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def prepare(self, model: Network, *, compiled: bool = True) -> Network:
        """`model` on the device, channels_last, with batch norm over the global batch and compiled where that is asked
        for; never with `compiled` False, for networks with hooks."""
        model = model.to(self.world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = self.world.synchronise_batch_norm(model) if self.sync_bn else model
        if self.compile and compiled:
            allow_forms()
            model.compile(dynamic=False)  # in place: names of weights stay; a stage has a handful of batch shapes
        return model

    def contrastive(self, *names: str | int) -> ContrastiveModel:
        """Backbone and projection head, their weights drawn from the generator of `names`; the backbone's as given
        where the run has a `start`."""
        return self._started(seeded(lambda: ContrastiveModel(self.model), self.generator(*names)))

    def classifier(self, *names: str | int) -> Classifier:
        """Backbone and linear head, in the same way."""
        return self._started(seeded(lambda: Classifier(self.model, self.num_classes), self.generator(*names)))

    def _started(self, model: OnBackbone) -> OnBackbone:
        if self.start is not None:
            model.backbone.load_state_dict(self.start)
        return model


def allow_forms() -> None:
    """Let torch.compile keep as many forms of the networks as the runs of a process have.

    Each stage has one for every shape of batch, with and without gradient, in train and in eval mode, and all networks
    count as one function: beyond torch's limit of 8 the rest would run uncompiled.
    """
    import torch._dynamo.config as dynamo  # takes seconds, where nothing is compiled too

    dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
