"""The losses against loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dbd_dist.losses import nt_xent, probability_mse, sharpen, soft_cross_entropy, symmetric_cross_entropy


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(v - max(row)) for v in row]
    return [e / sum(exps) for e in exps]


def nt_xent_loop(first: Tensor, second: Tensor, temperature: float, symmetric: bool) -> float:
    """Equation 1 of SimCLR's paper: l(i, j) over all pairs of a batch, every other projection in the denominator."""
    z = [row.double() / row.double().norm() for row in (*first, *second)]
    batch = len(first)

    def similar(i: int, j: int) -> float:
        return float(z[i] @ z[j]) / temperature

    total = 0.0
    anchors = range(2 * batch if symmetric else batch)
    for i in anchors:
        positive = (i + batch) % (2 * batch)
        denominator = sum(math.exp(similar(i, k)) for k in range(2 * batch) if k != i)
        total -= math.log(math.exp(similar(i, positive)) / denominator)
    return total / len(anchors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("batch", [2, 7])
def test_nt_xent(alone, batch, temperature, symmetric):
    first, second = normal(batch, 5, seed=1, scale=3.0), normal(batch, 5, seed=2)
    found = nt_xent(first, second, temperature, alone, symmetric=symmetric)
    assert found.item() == pytest.approx(nt_xent_loop(first, second, temperature, symmetric), rel=1e-5)


def test_one_sided_nt_xent_is_another_loss(alone):
    first, second = normal(7, 5, seed=1), normal(7, 5, seed=2)
    both = nt_xent(first, second, 0.5, alone)
    one, other = (
        nt_xent(a, b, 0.5, alone, symmetric=False) for a, b in ((first, second), (second, first))
    )  # fmt: skip
    assert abs(one - other) > 1e-3
    torch.testing.assert_close(both, (one + other) / 2)


def test_gradient_of_nt_xent(alone):
    first, second = normal(4, 3, seed=1).requires_grad_(), normal(4, 3, seed=2)
    nt_xent(first, second, 0.5, alone).backward()
    step = 1e-6
    for i in range(4):
        for d in range(3):
            sides = []
            for sign in (1, -1):
                moved = first.detach().double().clone()
                moved[i, d] += sign * step
                sides.append(nt_xent_loop(moved, second, 0.5, symmetric=True))
            assert first.grad[i, d].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-3, abs=1e-5)


def test_nt_xent_of_equal_projections_is_the_logarithm_of_the_choices(alone):
    same = torch.ones(6, 4)
    assert nt_xent(same, same, 0.5, alone).item() == pytest.approx(math.log(11))


SCE_LOGITS = [
    [2.0, -1.0, 0.5],
    [0.0, 0.0, 0.0],
    [30.0, -30.0, 0.0],  # p of the other classes is below 1e-7: clamped
    [-60.0, 60.0, 0.0],  # and that of the label far below
]


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 1.0), (1.0, 0.0), (0.0, 1.0), (2.0, 0.3)])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_symmetric_cross_entropy(alpha, beta, label):
    found = symmetric_cross_entropy(torch.tensor(SCE_LOGITS), torch.tensor([label] * 4), alpha, beta)
    assert found.dtype == torch.float32
    for row, value in zip(SCE_LOGITS, found.tolist()):
        ce = math.log(sum(math.exp(v - row[label]) for v in row))
        reverse = 0.0
        for k, p in enumerate(softmax(row)):
            one_hot = 1.0 if k == label else 0.0
            reverse -= min(max(p, 1e-7), 1.0) * math.log(min(max(one_hot, 1e-4), 1.0))
        assert value == pytest.approx(alpha * ce + beta * reverse, rel=1e-5, abs=1e-6)


def test_clamps_of_symmetric_cross_entropy_by_hand():
    # a sure and right answer still pays for the two clamped probabilities of the other classes
    sure = torch.tensor([[100.0, -100.0, -100.0]])
    right = symmetric_cross_entropy(sure, torch.tensor([0]), 0.0, 1.0).item()
    assert right == pytest.approx(2 * 1e-7 * -math.log(1e-4), rel=1e-4)
    # a sure and wrong one: cross-entropy grows without bound, its reverse stays at -log(1e-4)
    wrong = symmetric_cross_entropy(sure, torch.tensor([1]), 0.0, 1.0).item()
    assert wrong == pytest.approx(-math.log(1e-4), rel=1e-5)
    assert symmetric_cross_entropy(sure, torch.tensor([1]), 1.0, 0.0).item() == pytest.approx(200.0)
    assert math.isfinite(symmetric_cross_entropy(sure * 100, torch.tensor([1]), 0.1, 1.0).item())


def test_soft_cross_entropy():
    logits, target = normal(6, 4, scale=2.0), F.softmax(normal(6, 4, seed=1), dim=1)
    expected = 0.0
    for row, wanted in zip(logits.double().tolist(), target.double().tolist()):
        expected -= sum(t * math.log(p) for t, p in zip(wanted, softmax(row))) / 6
    assert soft_cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-5)
    labels = torch.tensor([0, 3, 2, 1, 1, 0])  # hard labels: plain cross-entropy
    torch.testing.assert_close(
        soft_cross_entropy(logits, F.one_hot(labels, 4).float()), F.cross_entropy(logits, labels)
    )


def test_probability_mse():
    logits, target = normal(6, 4, scale=2.0), F.softmax(normal(6, 4, seed=1), dim=1)
    total = 0.0
    for row, wanted in zip(logits.double().tolist(), target.double().tolist()):
        total += sum((p - t) ** 2 for p, t in zip(softmax(row), wanted))
    assert probability_mse(logits, target).item() == pytest.approx(total / (6 * 4), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0])
def test_sharpen(temperature):
    p = F.softmax(normal(5, 4), dim=1)
    found = sharpen(p, temperature)
    for row, sharp in zip(p.double().tolist(), found.double().tolist()):
        powers = [v ** (1 / temperature) for v in row]
        assert sharp == pytest.approx([v / sum(powers) for v in powers], rel=1e-5)
        assert sharp.index(max(sharp)) == row.index(max(row))
    if temperature == 1.0:
        torch.testing.assert_close(found, p)
    elif temperature < 1:
        assert (found.max(dim=1).values > p.max(dim=1).values).all()


def test_losses_compute_in_float32_whatever_they_are_given(alone):
    logits, labels = normal(4, 3).bfloat16(), torch.tensor([0, 1, 2, 0])
    target = F.one_hot(labels, 3).float()
    for loss in (
        symmetric_cross_entropy(logits, labels, 0.1, 1.0),
        soft_cross_entropy(logits, target),
        probability_mse(logits, target),
        nt_xent(logits, logits + 1, 0.5, alone),
    ):
        assert loss.dtype == torch.float32


@pytest.mark.parametrize("clamp", [1e-6, 1e-4, 0.05])
def test_the_clamp_of_the_label(clamp):
    """The reverse part grows with the logarithm of what stands for 0."""
    sure = torch.tensor([[100.0, -100.0, -100.0]])
    wrong = symmetric_cross_entropy(sure, torch.tensor([1]), 0.0, 1.0, clamp).item()
    assert wrong == pytest.approx(-math.log(clamp), rel=1e-5)
