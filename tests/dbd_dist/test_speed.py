"""What is done for speed or memory keeps the numbers, form against plain form; and no step waits for a device."""

from __future__ import annotations

import ast
import contextlib
import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from dbd_dist import optim
from dbd_dist.data import augment
from dbd_dist.data.loaders import ResidentImages, StreamedImages, copied_ahead
from dbd_dist.distributed.world import World
from dbd_dist.losses import nt_xent
from dbd_dist.stages import cuda_graph as recorded
from dbd_dist.stages import mixmatch, simclr, supervised, warmup

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def close(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    for name, value in one.items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(other[name]), msg=name, **tolerance)


# -- chunks


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def some_views() -> Tensor:
    """24 first views, then 24 second."""
    return torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def loss_of(first: Tensor, second: Tensor) -> Tensor:
    return nt_xent(first, second, 0.5, World())


@pytest.mark.parametrize("parts", [2, 4])
def test_chunks_without_batch_norm_give_the_gradient_of_the_whole_batch(alone, parts):
    context = tiny.make_context(alone, tiny.make_images())
    found = []
    for pieces in (1, parts):
        model = tiny.make_contrastive(context).double()
        model.eval()  # fixed statistics, so that images know nothing of each other
        views = some_views().double()
        if pieces == 1:
            loss = simclr.backward(model, views, lambda a, b: loss_of(a, b), context)
        else:
            loss = simclr.backward_in_chunks(model, model, views, pieces, loss_of, context)
        found.append((loss.item(), gradients(model)))
    (whole_loss, whole), (loss, chunked) = found
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    # the loss itself is taken in float32
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_chunks_with_batch_norm_against_one_graph_over_all_chunks(alone):
    """The oracle keeps every activation: the same chunks, one loss, one backward pass."""
    context = tiny.make_context(alone, tiny.make_images())
    views = some_views()
    oracle, model = tiny.make_contrastive(context), tiny.make_contrastive(context)
    pairs = [torch.cat(pair) for pair in zip(*(view.chunk(3) for view in views.chunk(2)))]
    projections = [oracle(pair).chunk(2) for pair in pairs]
    loss = loss_of(*(torch.cat([z[i] for z in projections]) for i in range(2)))
    loss.backward()
    found = simclr.backward_in_chunks(model, model, views, 3, loss_of, context)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradients(model), gradients(oracle), rtol=1e-4, atol=1e-6)
    close(tiny.weights_of(model), tiny.weights_of(oracle), rtol=0, atol=0)  # running statistics moved once


def test_two_ranks_pretrain_in_chunks_as_one_does(alone, two_ranks):
    weights, metrics = tiny.train_chunked(alone)
    for theirs, their_metrics in two_ranks(tiny.train_chunked):
        close(weights, theirs, rtol=2e-4, atol=2e-5)
        assert their_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_chunks_of_one_batch_are_the_batch(alone):
    """A chunk as large as the batch computes everything twice and changes nothing."""
    plain, _ = tiny.train_stage(alone, "simclr")
    context = tiny.make_context(alone, tiny.make_images())
    model = tiny.make_contrastive(context)
    tiny.run_simclr(replace(tiny.SIMCLR, chunk=tiny.SIMCLR.batch), context, model)
    close(plain, tiny.weights_of(model), rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 48])
def test_chunks_must_divide_the_batch(chunk):
    with pytest.raises(UserError, match="chunk"):
        replace(tiny.SIMCLR, chunk=chunk)


# -- LARS


def lars_both_ways(dtype: torch.dtype, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Weights after some steps with random gradients: of the optimiser, and of algorithm 1 in loops."""
    generator = torch.Generator().manual_seed(0)
    rate, momentum, decay, eta = 0.3, 0.9, 0.01, 0.001
    values = [torch.randn(shape, generator=generator).double() for shape in ((3, 4), (4,), (2, 3, 2, 2), (2, 2))]
    values[3].zero_()  # a tensor of zeros has no ratio
    parameters = [nn.Parameter(v.to(dtype)) for v in values]
    optimizer = optim.Lars(parameters, rate, momentum, decay)
    weights = [p.flatten().tolist() for p in parameters]
    velocity = [[0.0] * len(w) for w in weights]
    for _ in range(steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            w, g = weights[i], p.grad.flatten().tolist()
            of_w, of_g = math.hypot(*w), math.hypot(*g)
            beta = decay if p.ndim > 1 else 0.0
            ratio = eta * of_w / (of_g + beta * of_w) if p.ndim > 1 and of_w > 0 else 1.0
            velocity[i] = [momentum * v + rate * ratio * (a + beta * b) for v, a, b in zip(velocity[i], g, w)]
            weights[i] = [b - v for b, v in zip(w, velocity[i])]
        optimizer.step()
    return [(p.detach().flatten().double(), torch.tensor(w, dtype=torch.float64)) for p, w in zip(parameters, weights)]


def test_lars_against_its_algorithm_in_loops():
    for ours, loops in lars_both_ways(torch.float64, 3):
        torch.testing.assert_close(ours, loops)


def test_pretraining_with_lars_goes_on_from_a_state(alone):
    config = replace(tiny.SIMCLR, epochs=2, optimizer="lars")
    states: list[dict[str, Any]] = []
    found = []
    for resume in (None, 0):
        context = tiny.make_context(
            alone, tiny.make_images(), report=lambda end: states.append(torch.load(_saved(end.state())))
        )
        model = tiny.make_contrastive(context)
        tiny.run_simclr(config, context, model, None if resume is None else states[resume])
        found.append(tiny.weights_of(model))
    close(*found, rtol=0, atol=0)


def _saved(state: dict[str, Any]):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# -- compiled


@pytest.mark.slow
def test_compiled_network_computes_what_the_plain_one_does(alone):
    found = []
    for compiled in (False, True):
        context = replace(tiny.make_context(alone, tiny.make_images()), compile=compiled)
        model = tiny.make_classifier(context)
        images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        logits = model(images)
        logits.square().mean().backward()
        found.append({"logits": logits.detach(), "gradient": gradients(model)} | tiny.weights_of(model))
    close(*found, rtol=1e-4, atol=1e-5)


# -- replayed


class FakeCuda:
    """Stands in for torch.cuda: a graph whose recording changes nothing and whose replay runs the same inputs again."""

    def __init__(self):
        self.replays = 0
        self.Stream = lambda: self
        self.current_stream = lambda: self
        self.stream = lambda stream: contextlib.nullcontext()
        self.CUDAGraph = lambda: self

    def wait_stream(self, stream: object) -> None:
        pass

    @contextlib.contextmanager
    def graph(self, graph: object):
        model = self.step._model
        before = [buffer.clone() for buffer in model.buffers()]
        yield
        for buffer, value in zip(model.buffers(), before):  # a recording launches nothing
            buffer.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        losses = self.step._run()
        for held, new in zip(self.step._losses, losses):
            held.copy_(new.detach())


def test_recorded_step_is_fed_and_leaves_nothing_behind(alone, monkeypatch):
    """The bookkeeping around a graph, without one: inputs, scalars, running statistics, losses handed out."""
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    original = recorded.CUDAGraphedStep.__init__

    def remember(step, *arguments):
        original(step, *arguments)
        fake.step = step

    monkeypatch.setattr(recorded.CUDAGraphedStep, "__init__", remember)
    found, rows = [], []
    for replay in (False, True):
        context = replace(tiny.make_context(alone, tiny.make_images()), cuda_graphs=replay)
        context = replace(context, report=lambda end: rows.append(end.metrics["loss"]))
        model = tiny.make_classifier(context)
        tiny.run_mixmatch(replace(tiny.MIXMATCH, epochs=2, lr_schedule="cosine"), context, model)
        found.append(tiny.weights_of(model))
    assert fake.replays == 2 * tiny.MIXMATCH.steps
    close(*found, rtol=1e-5, atol=1e-6)
    assert rows[2:] == pytest.approx(rows[:2], rel=1e-5)


# -- nothing in a step waits for the device

STEPS = {
    simclr: ("train_epoch", "backward", "backward_in_chunks"),
    mixmatch: ("train_epoch", "make_backward", "mixmatch_losses"),
    supervised: ("train",),
    warmup: ("train_head", "sample_losses"),
    recorded: ("CUDAGraphedStep",),
}
WAITS = {"item", "cpu", "numpy", "tolist", "synchronize", "nonzero", "to"}


def waits(tree: ast.AST) -> list[str]:
    """Calls that copy to or from the device, or ask for a value."""
    return [
        f"line {node.lineno}: .{node.func.attr}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS
    ]


def innermost_loops(tree: ast.AST) -> list[ast.For]:
    """The loops over the steps of an epoch: those whose iterable is made by the meter."""
    return [n for n in ast.walk(tree) if isinstance(n, ast.For) and "steps" in ast.dump(n.iter)]


@pytest.mark.parametrize("module", STEPS, ids=lambda m: m.__name__.split(".")[-1])
def test_no_step_waits_for_the_device(module):
    tree = ast.parse(inspect.getsource(module))
    loops = innermost_loops(tree)
    assert loops or module is recorded
    for loop in loops:
        assert [w for statement in loop.body for w in waits(statement)] == []
    for name in STEPS[module]:
        if name in ("train_epoch", "train", "train_head"):
            continue  # their loop is what counts, and was looked at
        body = next(n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name)
        assert waits(body) == []


def test_a_planted_wait_is_found():
    tree = ast.parse("for step in meter.steps(batches, n):\n    total += loss.item()\n    x = y.to(device)\n")
    (loop,) = innermost_loops(tree)
    assert len([w for statement in loop.body for w in waits(statement)]) == 2


# -- on a GPU


@needs_cuda
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_steps_on_a_gpu_wait_for_nothing(stage):
    """CUDA raises at every wait between the first step of an epoch and its end."""
    world = World(device=torch.device("cuda"))
    config, run, make = tiny.STAGES[stage]

    def guard(_stage: str, _epoch: int, _epochs: int, step: int, steps: int) -> None:
        torch.cuda.set_sync_debug_mode("default" if step == steps else "error")

    context = replace(tiny.make_context(world, tiny.make_images(device=world.device)), tick=guard)
    try:
        run(config, context, make(context))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_replayed_step_learns_what_the_plain_one_does():
    world = World(device=torch.device("cuda"))
    found = []
    for replay in (False, True):
        context = replace(tiny.make_context(world, tiny.make_images(device=world.device)), cuda_graphs=replay)
        model = tiny.make_classifier(context)
        tiny.run_mixmatch(replace(tiny.MIXMATCH, epochs=2), context, model)
        found.append({name: value.cpu() for name, value in tiny.weights_of(model).items()})
    close(*found, rtol=1e-3, atol=1e-4)


@needs_cuda
@pytest.mark.parametrize("stage", tiny.STAGES)
def test_stages_on_a_gpu_learn_what_they_do_on_the_cpu(alone, stage):
    world = World(device=torch.device("cuda"))
    on_cpu, _ = tiny.train_stage(alone, stage)
    on_gpu, _ = tiny.train_stage(world, stage)
    close(on_cpu, {name: value.cpu() for name, value in on_gpu.items()}, rtol=2e-2, atol=2e-3)


@needs_cuda
def test_batches_copied_ahead_are_the_batches():
    """The source overwrites its buffer as FFCV's ring does; the consumer computes long enough to fall behind."""
    device = torch.device("cuda")
    ring = torch.empty(8, 64, 64, 3, dtype=torch.uint8)

    def read():
        for i in range(20):
            ring.fill_(i)
            yield ring[: 8 if i < 19 else 3]

    sums = []
    busy = torch.randn(2000, 2000, device=device)
    for batch in copied_ahead(read(), device):
        for _ in range(5):
            busy = (busy @ busy).tanh()
        sums.append(batch.float().mean() + 0 * busy.sum())
    assert torch.stack(sums).tolist() == list(range(20))


@needs_cuda
def test_streamed_batches_on_a_gpu_are_the_resident_ones(digits):
    dataset, device = open_dataset(digits), torch.device("cuda")
    positions = torch.randperm(240, generator=torch.Generator().manual_seed(0)).split(50)
    pairs = zip(
        StreamedImages.open(dataset, device).batches(positions), ResidentImages.read(dataset, device).batches(positions)
    )
    assert [torch.equal(*pair) for pair in pairs] == [True] * 5


# -- several batches augmented in one call


def test_joined_parameters_give_the_images_of_separate_calls():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (10, 16, 16, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    for config in (augment.simclr(), tiny.WEAK):
        parts = [augment.draw(config, n, height=16, width=16, generator=generator) for n in (4, 6)]
        together = augment.apply(config, images, augment.join(parts))
        apart = [augment.apply(config, i, p) for i, p in zip(images.split([4, 6]), parts)]
        assert torch.equal(together, torch.cat(apart))


def test_every_form_of_the_networks_is_compiled(monkeypatch):
    counter, compile_ = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compile_(self, backend=counter, **how))
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave it hidden from the tests that follow
        model = replace(tiny.make_context(World(), tiny.make_images()), compile=True).prepare(nn.Linear(3, 2))
        for batch in range(2, 14):
            model(torch.zeros(batch, 3))
    assert counter.frame_count == 12
    torch.compiler.reset()
