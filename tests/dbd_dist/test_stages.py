"""The stages in a world of one, against loops and against themselves with one thing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.errors import UserError
from dbd_dist import seeds
from dbd_dist.data import augment
from dbd_dist.data.loaders import ResidentImages
from dbd_dist.distributed.world import World
from dbd_dist.runtime.checkpoint import load_state, save_state
from dbd_dist.stages import mixmatch, split, warmup
from dbd_dist.stages.context import EpochEnd, StepEnd


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


# -- going on from an epoch


def run_stage(
    world, stage: str, epochs: int, *, resume: dict[str, Any] | None = None, states: Path | None = None
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Weights after the last epoch and the metrics of all; a stage's states are written to disk on the way."""
    config, run, make = tiny.STAGES[stage]
    rows: list[dict[str, float]] = []

    def report(end: EpochEnd) -> None:
        rows.append({"epoch": end.epoch} | {k: v for k, v in end.metrics.items() if "_s" not in k})
        if states is not None:
            save_state(end.state(), states / f"{end.epoch}.pt")

    context = tiny.make_context(world, tiny.make_images(), report=report)
    # other initial weights where a state replaces them: what is forgotten in it shows
    model = make(context, seed=1 if resume is None else 2)
    run(replace(config, epochs=epochs), context, model, resume)
    return tiny.weights_of(model), rows


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_resume_after_any_epoch_is_bit_exact(alone, tmp_path, stage):
    whole, rows = run_stage(alone, stage, 3, states=tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    for epoch in (1, 2, 3):
        resumed, later = run_stage(alone, stage, 3, resume=load_state(tmp_path / f"{epoch}.pt", needs=("epoch",)))
        assert later == rows[epoch:]
        assert_same(resumed, whole)
    shorter, _ = run_stage(alone, stage, 2)
    if stage not in ("simclr", "mixmatch", "uat", "dpsgd"):  # their schedules depend on the number of epochs
        assert_same(shorter, load_state(tmp_path / "2.pt", needs=("model",))["model"])
    assert differ(shorter, whole)


def test_the_first_step_with_a_loss_that_is_not_finite_is_named(alone):
    """The weights are spoilt after step 5; step 6 is the first to see it, whatever comes later."""
    config, run, make = tiny.STAGES["mixmatch"]

    def spoil(end: StepEnd) -> None:
        if (end.epoch, end.step) == (2, 5):
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    context = replace(tiny.make_context(alone, tiny.make_images()), after_step=spoil)
    model = make(context)
    with pytest.raises(UserError) as caught:
        run(replace(config, steps=9, epochs=3), context, model)
    assert caught.value.where == "mixmatch, epoch 2, step 6 of 9"


# -- going on inside an epoch


def steps_of(stage: str) -> list[tuple[int, int]]:
    """(epoch, step) of every step of two epochs but the last of each."""
    steps = tiny.MIXMATCH.steps if stage == "mixmatch" else 2
    return [(epoch, step) for epoch in (1, 2) for step in range(1, steps)]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_every_step_ticks(alone, stage):
    config, run, make = tiny.STAGES[stage]
    ticks: list[tuple[str, int, int, int, int]] = []
    context = replace(tiny.make_context(alone, tiny.make_images()), tick=lambda *at: ticks.append(at))
    run(config, context, make(context))
    steps = tiny.MIXMATCH.steps if stage == "mixmatch" else 2
    assert ticks == [(stage, 1, 1, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_resume_after_any_step_is_bit_exact(alone, tmp_path, stage):
    config, run, make = tiny.STAGES[stage]
    rows: list[dict[str, float]] = []

    def report(end: EpochEnd) -> None:
        rows.append({"epoch": end.epoch} | {k: v for k, v in end.metrics.items() if "_s" not in k})

    def keep(end: StepEnd) -> None:
        save_state(end.state(), tmp_path / f"{end.epoch}-{end.step}.pt")

    context = replace(tiny.make_context(alone, tiny.make_images(), report=report), after_step=keep)
    model = make(context)
    run(replace(config, epochs=2), context, model)
    whole, all_rows = tiny.weights_of(model), rows.copy()
    points = steps_of(stage)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{epoch}-{step}.pt" for epoch, step in points)
    for epoch, step in points:
        state = load_state(tmp_path / f"{epoch}-{step}.pt", needs=("epoch", "step", "meter"))
        assert (state["epoch"], state["step"]) == (epoch - 1, step)
        resumed, later = run_stage(alone, stage, 2, resume=state)
        assert later == all_rows[epoch - 1 :]  # the epoch's mean holds the steps before
        assert_same(resumed, whole)


# -- stage 1


class Unlabelled:
    """Images whose labels must not be touched."""

    def __init__(self, images: ResidentImages):
        self._images, self.batches = images, images.batches

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> Tensor:
        raise AssertionError("labels were read")


def test_pretraining_never_reads_labels(alone):
    images = tiny.make_images()
    weights = []
    for given in (images, Unlabelled(images)):
        context = tiny.make_context(alone, given)
        model = tiny.make_contrastive(context)
        tiny.run_simclr(tiny.SIMCLR, context, model)
        weights.append(tiny.weights_of(model))
    assert_same(*weights)


@pytest.mark.parametrize("stage", ["warmup", "mixmatch", "supervised"])
def test_the_other_stages_do_read_labels(alone, stage):
    config, run, make = tiny.STAGES[stage]
    context = tiny.make_context(alone, Unlabelled(tiny.make_images()))
    with pytest.raises(AssertionError, match="labels were read"):
        run(config, context, make(context))


@pytest.mark.parametrize(("warmup_epochs", "schedule_epochs"), [(0, None), (1, None), (0, 10)])
def test_learning_rate_of_pretraining(alone, warmup_epochs, schedule_epochs):
    rows = []
    context = tiny.make_context(alone, tiny.make_images(), report=lambda end: rows.append(end.metrics["lr"]))
    config = replace(
        tiny.SIMCLR, epochs=3, lr=0.2, warmup_epochs=warmup_epochs, schedule_epochs=schedule_epochs
    )  # fmt: skip
    tiny.run_simclr(config, context, tiny.make_contrastive(context))
    total, steps = schedule_epochs or 3, 48 // 24
    for epoch, lr in enumerate(rows):  # the rate of each epoch's last step
        at = epoch + (steps - 1) / steps
        if at < warmup_epochs:
            expected = 0.2 * at / warmup_epochs
        else:
            expected = 0.1 * (1 + math.cos(math.pi * (at - warmup_epochs) / (total - warmup_epochs)))
        assert lr == pytest.approx(expected)


# -- stage 2


def warm_up(world, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], nn.Module]:
    context = tiny.make_context(world, tiny.make_images())
    model = tiny.make_classifier(context)
    before = tiny.weights_of(model)
    tiny.run_warmup(replace(tiny.WARMUP, epochs=2, **options), context, model)
    return before, tiny.weights_of(model), model


def test_warm_up_leaves_the_backbone_alone(alone):
    before, after, model = warm_up(alone)
    assert any("running_mean" in name for name in before)
    assert differ(before, after) == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())  # MixMatch trains all of it


def test_without_frozen_batch_norm_only_its_statistics_drift(alone):
    before, after, _ = warm_up(alone, freeze_batch_norm=False)
    buffers = {n for n in before if n.rsplit(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    assert differ(before, after) == buffers | {"head.weight", "head.bias"}


def test_loss_of_the_warm_up_can_be_plain_cross_entropy(alone):
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    plain = warmup.sample_losses(replace(tiny.WARMUP, loss="ce"), logits, labels)
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, reduction="none"))
    assert not torch.allclose(plain, warmup.sample_losses(tiny.WARMUP, logits, labels))
    assert differ(warm_up(alone)[1], warm_up(alone, loss="ce")[1]) == {"head.weight", "head.bias"}


# -- the filter


def sce(logits: list[float], label: int, alpha: float, beta: float) -> float:
    """One sample's symmetric cross-entropy, in Python's floats."""
    exps = [math.exp(v - max(logits)) for v in logits]
    p = [min(max(e / sum(exps), 1e-7), 1.0) for e in exps]
    reverse = -sum(p[k] * math.log(1.0 if k == label else 1e-4) for k in range(len(p)))
    return alpha * -math.log(exps[label] / sum(exps)) + beta * reverse


@pytest.mark.parametrize("batch", [1, 10, 100])
def test_losses_of_the_filter_against_a_loop(alone, batch):
    images = tiny.make_images(37)
    context = tiny.make_context(alone, images)
    _, _, model = warm_up(alone)  # statistics of its own, or eval mode would show nothing
    model.train()
    before = tiny.weights_of(model)
    config = replace(tiny.SPLIT, batch=batch)
    losses = split.measure_losses(config, tiny.SAMPLE_LOSS, model, context, epoch=3)
    assert model.training
    assert_same(before, tiny.weights_of(model))

    params = augment.draw(
        config.augment, 37, height=16, width=16, generator=seeds.generator(5, "split", 3, "augment")
    )  # fmt: skip
    model.eval()
    expected = []
    with torch.no_grad():
        for i in range(37):
            pixels = next(images.batches([torch.tensor([i])]))
            logits = model(augment.apply(config.augment, pixels, params[i : i + 1]))[0].double().tolist()
            expected.append(sce(logits, int(images.labels[i]), tiny.WARMUP.sce_alpha, tiny.WARMUP.sce_beta))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-4)

    kept = split.split(losses, images.labels, tiny.CLASSES, replace(config, keep=0.3))
    by_loss = sorted(range(37), key=lambda i: float(losses[i]))
    assert {i for i in range(37) if kept[i]} == set(by_loss[:11])  # round(0.3 * 37)
    assert not torch.equal(losses, split.measure_losses(config, tiny.SAMPLE_LOSS, model, context, epoch=4))


# -- stage 3


def fine_tune(world, labels: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Weights after an epoch of MixMatch, on other labels where they are given."""
    images = tiny.make_images()
    if labels is not None:
        images = ResidentImages(next(images.batches([torch.arange(48)])).permute(0, 2, 3, 1), labels)
    context = tiny.make_context(world, images)
    model = tiny.make_classifier(context)
    tiny.run_mixmatch(replace(tiny.MIXMATCH, **options), context, model)
    return tiny.weights_of(model)


@pytest.fixture
def fixed_split(monkeypatch) -> Tensor:
    """The filter ranks by the given labels, so it is held still to see what else they do: bool (48,), the kept."""
    losses = torch.rand(48, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(mixmatch, "measure_scores", lambda *_: (losses, None))
    kept = split.split(losses, tiny.make_images().labels, tiny.CLASSES, tiny.SPLIT)
    assert kept.sum() == 24
    return kept


def test_doubtful_labels_have_no_influence_on_fine_tuning(alone, fixed_split):
    labels = tiny.make_images().labels
    reference = fine_tune(alone, labels)
    wrong = (labels + 1) % tiny.CLASSES
    assert_same(fine_tune(alone, torch.where(fixed_split, labels, wrong)), reference)
    # the control: those of the kept half do have one
    assert "head.bias" in differ(fine_tune(alone, torch.where(fixed_split, wrong, labels)), reference)


def test_doubtful_images_do_have_an_influence(alone, fixed_split):
    """They are learnt from, without their labels."""
    assert differ(fine_tune(alone), fine_tune(alone, lambda_u=0.0))


def recorded_calls(monkeypatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    original = mixmatch.mixmatch_losses

    def record(network, model, views, given_BK, **options):
        calls.append(options | {"views": views, "given": given_BK})
        return original(network, model, views, given_BK, **options)

    monkeypatch.setattr(mixmatch, "mixmatch_losses", record)
    return calls


@pytest.mark.parametrize(("ramp_epochs", "ramp_steps"), [(2, 4), (None, 6)])
def test_weight_of_the_unlabelled_loss_grows_linearly(alone, monkeypatch, ramp_epochs, ramp_steps):
    calls = recorded_calls(monkeypatch)
    fine_tune(alone, epochs=3, steps=2, lambda_u=10.0, ramp_epochs=ramp_epochs)
    expected = [10.0 * min(step / ramp_steps, 1.0) for step in range(6)]
    assert [call["lambda_u"] for call in calls] == pytest.approx(expected)
    assert expected[0] == 0.0


def test_a_step_of_fine_tuning_gets_kept_labels_and_two_views_of_the_rest(alone, monkeypatch, fixed_split):
    calls = recorded_calls(monkeypatch)
    labels = tiny.make_images().labels
    fine_tune(alone, steps=6, augment=augment.none())
    pixels = augment.normalise(augment.none(), next(tiny.make_images().batches([torch.arange(48)])))

    def positions(view: Tensor) -> list[int]:
        distance, nearest = torch.cdist(view.flatten(1), pixels.flatten(1)).min(dim=1)
        assert distance.max() < 1  # the others are some thirty away
        return nearest.tolist()

    seen = []
    for call in calls:
        sharp, first, second = map(positions, call["views"])
        assert first == second  # the same images; without augmentation also the same views
        assert fixed_split[sharp].all()
        assert not fixed_split[first].any()
        assert call["given"].argmax(1).tolist() == labels[sharp].tolist()
        assert sorted(call["order"].tolist()) == list(range(36))
        assert 0.5 <= call["mix"] <= 1.0
        seen += sharp
    assert sorted(seen) == sorted([i for i in range(48) if fixed_split[i]] * 3)  # six batches of 12 from 24


def test_views_of_an_unlabelled_image_differ(alone, monkeypatch):
    calls = recorded_calls(monkeypatch)
    fine_tune(alone, steps=1)
    _, first, second = calls[0]["views"]
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.01, 0.97, 1.0), (0.75, 0.75, 0.85), (500.0, 0.5, 0.52)])
def test_mixing_weights_follow_beta(alpha, low, high):
    config = replace(tiny.MIXMATCH, mix_alpha=alpha, steps=20_000)
    drawn = mixmatch._mixing_weights(config, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0.5
    assert drawn.max() <= 1.0
    assert low <= drawn.mean() <= high
    # max(l, 1 - l) averages what |l - 1/2| + 1/2 does: integrate Beta's density over the midpoints of small steps
    grid = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = (grid * (1 - grid)) ** (alpha - 1.0) if alpha == 0.75 else None
    if density is not None:
        expected = (density * (np.abs(grid - 0.5) + 0.5)).sum() / density.sum()
        assert drawn.mean() == pytest.approx(expected, abs=0.005)


def mixmatch_loop(
    model: nn.Module,
    views: tuple[Tensor, Tensor, Tensor],
    given: Tensor,
    *,
    temperature: float,
    mix: float,
    order: Tensor,
    lambda_u: float,
) -> tuple[tuple[float, float, float], list[Tensor]]:
    """Equations 3 to 11 of MixMatch's paper over single numbers: the losses, and the mixed images."""
    labelled, first, second = views
    count, classes = given.shape

    def softmax(x: Tensor) -> list[float]:
        exps = [math.exp(v) for v in model(x[None])[0].tolist()]
        return [e / sum(exps) for e in exps]

    guesses = []
    for a, b in zip(first, second):
        mean = [(p + q) / 2 for p, q in zip(softmax(a), softmax(b))]
        powers = [p ** (1 / temperature) for p in mean]
        guesses.append([p / sum(powers) for p in powers])
    inputs = [*labelled, *first, *second]
    targets = [*given.tolist(), *guesses, *guesses]
    supervised = consistency = 0.0
    mixed = []
    for i, partner in enumerate(order.tolist()):
        mixed.append(mix * inputs[i] + (1 - mix) * inputs[partner])
        target = [mix * t + (1 - mix) * u for t, u in zip(targets[i], targets[partner])]
        p = softmax(mixed[-1])
        if i < count:
            supervised -= sum(t * math.log(q) for t, q in zip(target, p)) / count
        else:
            consistency += sum((q - t) ** 2 for t, q in zip(target, p)) / (2 * count * classes)
    return (supervised + lambda_u * consistency, supervised, consistency), mixed


def test_mixmatch_losses_against_a_loop():
    """A linear network, so that only the bookkeeping is left: who is mixed with whom, and which target goes along."""
    generator = torch.Generator().manual_seed(0)
    count, classes, temperature, mix, lambda_u = 4, 3, 0.5, 0.7, 2.5
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    labelled, first, second = (torch.randn(count, 3, 2, 2, generator=generator).double() for _ in range(3))
    given = F.one_hot(torch.tensor([2, 0, 1, 1]), classes).double()
    order = torch.randperm(3 * count, generator=generator)
    batches: list[Tensor] = []

    def network(x: Tensor) -> Tensor:
        batches.append(x)
        return model(x)

    found = mixmatch.mixmatch_losses(
        network, model, (labelled, first, second), given,
        temperature=temperature, mix=mix, order=order, lambda_u=lambda_u, world=World(),
    )  # fmt: skip

    expected, mixed = mixmatch_loop(
        model, (labelled, first, second), given, temperature=temperature, mix=mix, order=order, lambda_u=lambda_u
    )
    assert [v.item() for v in found] == pytest.approx(expected, rel=1e-5)
    assert len(batches) == 3  # each over every third image: labelled and unlabelled ones in each
    for part, batch in enumerate(batches):
        torch.testing.assert_close(batch, torch.stack(mixed[part::3]))


def test_guessed_labels_carry_no_gradient():
    """The same network as guesser and as learner, or a frozen copy as guesser: the gradient is the same."""
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(4, 3, 2, 2, generator=generator) for _ in range(3))
    given = F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    order = torch.randperm(12, generator=generator)
    weight = torch.randn(3, 12, generator=generator)
    gradients = []
    for guesser_learns in (True, False):
        model: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        guesser: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        for each in (model, guesser):
            each[1].weight.data.copy_(weight)
            each[1].bias.data.zero_()
        loss, _, _ = mixmatch.mixmatch_losses(
            model, model if guesser_learns else guesser, views, given,
            temperature=0.5, mix=0.8, order=order, lambda_u=3.0, world=World(),
        )  # fmt: skip
        loss.backward()
        gradients.append(model[1].weight.grad)
    torch.testing.assert_close(*gradients)


def test_fine_tuning_continues_with_the_optimiser_of_the_warm_up(alone):
    def train(state: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Tensor]:
        context = tiny.make_context(alone, tiny.make_images())
        model = tiny.make_classifier(context)
        optimizer = warmup.train_head(tiny.WARMUP, model, context, None)
        held = state(optimizer.state_dict())
        mixmatch.fine_tune(tiny.MIXMATCH, tiny.SPLIT, tiny.SAMPLE_LOSS, model, held, context, None)
        return tiny.weights_of(model)

    assert "head.weight" in differ(train(lambda state: state), train(lambda state: None))


def test_split_state_keeps_the_first_split(alone):
    splits = []
    context = tiny.make_context(alone, tiny.make_images())
    for epochs in (1, 3):
        model = tiny.make_classifier(context)
        config = replace(tiny.MIXMATCH, epochs=epochs, lr_schedule="constant", ramp_epochs=3)
        splits.append(mixmatch.fine_tune(config, tiny.SPLIT, tiny.SAMPLE_LOSS, model, None, context, None)[1])
    short, long = splits
    assert torch.equal(short["first_loss"], short["loss"])
    assert torch.equal(long["first_loss"], short["first_loss"])
    assert torch.equal(long["first_kept"], short["kept"])
    assert not torch.equal(long["loss"], long["first_loss"])


# -- no defence, and what goes wrong


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("step", [0.1, 0.01, 0.001]),
        ("cosine", [0.05 * (1 + math.cos(math.pi * (epoch + 0.5) / 3)) for epoch in range(3)]),  # last of two steps
    ],
)
def test_learning_rate_of_supervised_training(alone, schedule, expected):
    rows = []
    context = tiny.make_context(alone, tiny.make_images(), report=lambda end: rows.append(end.metrics["lr"]))
    config = replace(tiny.SUPERVISED, epochs=3, lr=0.1, schedule=schedule, milestones=(1, 2))
    tiny.run_supervised(config, context, tiny.make_classifier(context))
    assert rows == pytest.approx(expected)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_loss_that_is_not_finite_ends_a_stage(alone, stage):
    config, run, make = tiny.STAGES[stage]
    ends: list[EpochEnd] = []
    context = tiny.make_context(alone, tiny.make_images(), report=ends.append)
    model = make(context)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError) as caught:
        run(config, context, model)
    assert str(caught.value.where).startswith(f"{stage}, epoch 1, step 1 of ")
    assert f"{stage}.lr" in str(caught.value.hint)
    assert ends == []  # nothing was reported, so no checkpoint was written


def test_stages_leave_the_global_generators_alone(alone):
    for stage in tiny.STAGES:
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        run_stage(alone, stage, 1)
        assert torch.equal(before[0], torch.random.get_rng_state()), stage
        assert (before[1] == np.random.get_state()[1]).all(), stage  # noqa: NPY002


def test_the_split_is_renewed_every_so_many_epochs(alone, monkeypatch):
    renewed: list[int] = []
    renew = mixmatch.renew

    def watch(split_state, split_rule, sample_loss, model, context, epoch, **options):
        renewed.append(epoch)
        return renew(split_state, split_rule, sample_loss, model, context, epoch, **options)

    monkeypatch.setattr(mixmatch, "renew", watch)
    context = tiny.make_context(alone, tiny.make_images())
    tiny.run_mixmatch(replace(tiny.MIXMATCH, epochs=5, refresh=2), context, tiny.make_classifier(context))
    assert renewed == [1, 3, 5]
