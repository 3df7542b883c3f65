"""The filter between stages 2 and 3: rank all samples by the loss of their given label; the best keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from data_prep.errors import UserError
from dbd_dist.data import augment
from dbd_dist.data.augment import AugmentConfig
from dbd_dist.data.label_noise import FLOOR, held_out_probabilities, noise_rates, wrong_label_probability
from dbd_dist.data.linear_patterns import pattern_scores, shrink, stand_out
from dbd_dist.data.sampling import keep_lowest, rank_slice
from dbd_dist.data.split_rules import keep_balanced, keep_mixture, keep_trusted, neighbour_distance, neighbour_votes
from dbd_dist.fields import require
from dbd_dist.models.heads import Classifier
from dbd_dist.stages.context import Context
from dbd_dist.stages.stage import Stage

ADDED = {"omit_default": True}
"""Of fields that came after version 0.1: at their defaults, keys of stages are what they were."""

SCANNED = 512
"""Images that are read at a time where no network sees them."""

BETWEEN = ("mixture", "trusted")
"""Rules that keep between `keep` and `keep_most`."""

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels (B,)) -> the loss of each sample (B,)."""


@dataclass(frozen=True, kw_only=True)
class Split(Stage):
    """The filter: one global ranking of all samples by their SCE loss; the lowest keep their labels."""

    name: ClassVar[str] = "split"
    title: ClassVar[str] = "Split by loss"
    gives: ClassVar[tuple[str, ...]] = ("split_rule",)
    trains: ClassVar[bool] = False

    keep: float = 0.5
    """Fraction of the samples that keep their labels; with the rules mixture and trusted, the least."""
    augment: AugmentConfig = field(default_factory=augment.weak_pad)
    """The one draw that losses are measured on."""
    batch: int = 512
    """Images a forward pass over all workers; no influence on the result."""
    rule: Literal["global", "balanced", "mixture", "trusted"] = field(default="global", metadata=ADDED)
    """global: one ranking of all samples, as published. balanced: an equal count of every given class. mixture: of
    every given class those in the lower of two heaps of losses, between `keep` and `keep_most`. trusted: of every given
    class as many as can be kept with `wrong` of the labels expected to be wrong, between the same bounds; needs the
    score label-noise."""
    keep_most: float = field(default=0.9, metadata=ADDED)
    """With the rules mixture and trusted: the fraction that is kept at most."""
    wrong: float = field(default=0.01, metadata=ADDED)
    """With the rule trusted: the share of the kept labels of a class that are expected to be wrong."""
    score: Literal["loss", "neighbours", "both", "label-noise"] = field(default="loss", metadata=ADDED)
    """What ranks a sample. loss: the classifier's, of the given label. neighbours: the same loss of the labels that
    its nearest neighbours among the features vote for. both: the mean of the two. label-noise: the probability that the
    label is wrong, by what the surest samples of other classes are labelled (`dbd_dist.data.label_noise`)."""
    neighbours: int = field(default=20, metadata=ADDED)
    """How many neighbours vote."""
    scan: bool = field(default=False, metadata=ADDED)
    """Do without the images that carry a pattern which marks their label, labelled or not
    (`dbd_dist.data.linear_patterns`)."""
    leave_out: float = field(default=0.0, metadata=ADDED)
    """Fraction of the samples that training does without, labelled or not: those that lie alone, or in a small group of
    their own, among the features of the first split."""
    leave_out_until: float = field(default=1.0, metadata=ADDED)
    """After this fraction of the fine-tuning's epochs they are split like the others: the network knows more then."""
    leave_out_neighbours: float = field(default=0.15, metadata=ADDED)
    """Counted over how many neighbours, as a fraction of all samples: more than one trigger may have poisoned."""

    def __post_init__(self):
        require(
            self, "split", keep="in (0, 1)", batch=">= 1", keep_most="in (0, 1)", neighbours=">= 1",
            wrong="in (0, 1)", leave_out="in [0, 1)", leave_out_until="in (0, 1]", leave_out_neighbours="in (0, 1)",
        )  # fmt: skip
        if self.rule == "trusted" and self.score != "label-noise":
            raise UserError(
                f"the rule trusted does not know what the score {self.score} expects to be wrong",
                where="--split.score",
                expected="label-noise",
            )
        if self.rule in BETWEEN and self.keep_most < self.keep:
            raise UserError(
                f"keep_most is {self.keep_most}, keep is {self.keep}",
                where="--split.keep-most",
                expected="at least --split.keep",
            )

    def bounds(self) -> tuple[float, float]:
        """The fractions that it keeps at least and at most."""
        there = 1 - self.leave_out
        return there * self.keep, there * (self.keep_most if self.rule in BETWEEN else self.keep)

    def offers(self) -> dict[str, Any]:
        return {"split_rule": self}


class Measured(NamedTuple):
    """What the network makes of all N training samples, the same on all ranks."""

    losses_N: Tensor
    """Of the given labels, float32."""
    logits_NK: Tensor | None
    features_ND: Tensor | None
    """float32; None, as the logits, where they were not asked for."""


@torch.no_grad()
def measure(
    config: Split, sample_loss: SampleLoss, model: Classifier, context: Context, epoch: int, *, features: bool
) -> Measured:
    """Losses, and features and logits where they are asked for: in eval mode on one augmented draw."""
    world, images = context.world, context.images
    total = len(images)
    positions = torch.arange(total)[rank_slice(total, world.rank, world.size)]
    size = max(config.batch // world.size, 1)
    chunks = positions.split(size)
    labels = images.labels[positions.to(world.device)].split(size)
    draws = context.generator("split", epoch, "augment")
    params = None
    was_training = model.training
    model.eval()
    losses, scores, pooled = [], [], []
    for chunk, given, pixels in zip(chunks, labels, images.batches(chunks)):
        if params is None:
            params = augment.draw(config.augment, total, height=pixels.shape[2], width=pixels.shape[3], generator=draws)
        with context.autocast():
            views = augment.apply(config.augment, pixels, params[chunk])
            if features:
                pooled.append(model.backbone(views).float())
                logits = model.head(pooled[-1])
                scores.append(logits.float())
            else:
                logits = model(views)
        losses.append(sample_loss(logits, given))
    model.train(was_training)
    logits_NK, features_ND = (world.gather(torch.cat(x)) if features else None for x in (scores, pooled))
    return Measured(world.gather(torch.cat(losses)), logits_NK, features_ND)


def measure_scores(
    config: Split,
    sample_loss: SampleLoss,
    model: Classifier,
    context: Context,
    epoch: int,
    rates_N: Tensor | None = None,
    marked_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The score of every training sample by `config.score`, low where its label fits.

    Args:
        rates_N: what an earlier call returned beside the scores.
        marked_N: `find_marked`; what labels say is asked of the others, and these are as doubtful as can be.

    Returns:
        float32 (N,) on the CPU, the same on all ranks; and, for the score label-noise, how often samples of other
        classes are given each sample's label, float32 (N,) on the CPU.
    """
    losses, logits, features = measure(config, sample_loss, model, context, epoch, features=config.score != "loss")
    if features is None or logits is None:
        return losses.cpu(), None
    labels = context.images.labels
    if config.score == "label-noise":
        return _label_noise(logits, features, context, epoch, rates_N, marked_N)
    votes = neighbour_votes(features, labels, context.num_classes, config.neighbours)  # of all, on every rank
    of_votes = sample_loss(votes.clamp_min(1e-7).log(), labels)
    return (of_votes if config.score == "neighbours" else (losses + of_votes) / 2).cpu(), None


def _label_noise(
    logits_NK: Tensor,
    features_ND: Tensor,
    context: Context,
    epoch: int,
    rates_N: Tensor | None,
    marked_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The probability that each label is wrong, and the rates at which labels are given to samples of other classes.

    Rates are of the data, and estimated once, before a network has seen any label: by regressions, since the warm-up's
    head is too sure of itself (SCE) and was trained on what it scores. Later the network itself is the better judge: it
    learnt from kept labels only.
    """
    labels, classes = context.images.labels, context.num_classes
    if rates_N is None:
        dealer = context.generator("split", epoch, "folds")
        there = torch.ones_like(labels, dtype=torch.bool) if marked_N is None else ~marked_N.to(labels.device)
        probabilities = features_ND.new_full((len(labels), classes), 1 / classes)
        probabilities[there] = held_out_probabilities(features_ND[there], labels[there], classes, dealer)
        rates_K = noise_rates(probabilities[there], labels[there])
    else:
        probabilities = logits_NK.softmax(dim=1)
        rates_K = probabilities.new_full((classes,), FLOOR).scatter(0, labels, rates_N.to(labels.device))
    wrong_N = wrong_label_probability(probabilities, labels, rates_K)
    if marked_N is not None:
        wrong_N[marked_N.to(wrong_N.device)] = 1.0
    # regressions on two machines may round differently; the split has to be one
    return context.world.broadcast((wrong_N.cpu(), rates_K[labels].cpu()))


def measure_losses(config: Split, sample_loss: SampleLoss, model: Classifier, context: Context, epoch: int) -> Tensor:
    """The scores alone, see `measure_scores`."""
    return measure_scores(config, sample_loss, model, context, epoch)[0]


@torch.no_grad()
def find_marked(context: Context) -> Tensor:
    """bool (N,) on the CPU: the samples that carry a pattern which marks their label, the same on all ranks."""
    world, images = context.world, context.images
    mine = torch.arange(len(images))[rank_slice(len(images), world.rank, world.size)]
    parts = [shrink(pixels) for pixels in images.batches(mine.split(SCANNED))]
    pixels_NP = world.gather(torch.cat(parts).to(world.device))
    scores = pattern_scores(pixels_NP, images.labels, context.generator("split", "scan"))
    marked = stand_out(scores.cpu(), images.labels.cpu(), context.num_classes)
    return world.broadcast(marked)  # discriminants on two machines may round differently


def find_left_out(config: Split, sample_loss: SampleLoss, model: Classifier, context: Context) -> Tensor:
    """bool (N,) on the CPU: the samples that training does without, by the features of `model`."""
    features = measure(config, sample_loss, model, context, 0, features=True).features_ND
    assert features is not None
    count = round(config.leave_out * len(features))
    far = neighbour_distance(features, round(config.leave_out_neighbours * len(features))).cpu()
    left_out = torch.zeros(len(features), dtype=torch.bool)
    left_out[torch.argsort(far, descending=True, stable=True)[:count]] = True
    return left_out


def split(losses_N: Tensor, labels_N: Tensor, classes: int, config: Split, without_N: Tensor | None = None) -> Tensor:
    """bool (N,) on the CPU: which samples keep their labels; fractions count those that training does not do
    without."""
    labels_N = labels_N.cpu()
    if without_N is not None and without_N.any():
        kept = torch.zeros_like(without_N)
        kept[~without_N] = split(losses_N[~without_N], labels_N[~without_N], classes, config)
        return kept
    if config.rule == "balanced":
        return keep_balanced(losses_N, labels_N, classes, config.keep)
    if config.rule == "mixture":
        return keep_mixture(losses_N, labels_N, classes, config.keep, config.keep_most)
    if config.rule == "trusted":
        return keep_trusted(losses_N, labels_N, classes, config.keep, config.keep_most, config.wrong)
    return keep_lowest(losses_N, config.keep)
