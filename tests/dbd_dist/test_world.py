"""The world's collectives, and batch norm over it, against one process that holds everything."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from dbd_dist.distributed import exchange
from dbd_dist.distributed.world import World


def test_collectives_of_two_ranks(two_ranks):
    zero, one = two_ranks(tiny.collectives)
    for result in (zero, one):
        assert result["gather"].tolist() == [0.0, 10.0, 11.0]  # unequal shares, in rank order
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["mean"].tolist() == [1.5, 1.5]
        assert result["broadcast"] == {"from": 0}
    # rank r weights the gathered rows with (r + 1) * (1, 2, 3, 4); a row's gradient is the sum over both ranks
    assert zero["grad"].tolist() == [1 + 2, 2 + 4]
    assert one["grad"].tolist() == [3 + 6, 4 + 8]
    # both ranks weight the six gathered rows with the columns of ((0, ..., 5), (6, ..., 11))
    assert zero["grad_transposed"].tolist() == [[0, 12], [2, 14], [4, 16]]
    assert one["grad_transposed"].tolist() == [[6, 18], [8, 20], [10, 22]]
    assert (zero["unchanged"].tolist(), one["unchanged"].tolist()) == ([1.0, 1.0], [2.0, 2.0])
    assert (zero["is_main"], one["is_main"]) == (True, False)


def test_a_world_of_one_changes_nothing(alone):
    result = tiny.collectives(alone)
    assert result["gather"].tolist() == [0.0]
    assert result["sum"].tolist() == result["mean"].tolist() == [1.0, 1.0]
    assert result["broadcast"] == {"from": 0}
    module = nn.Sequential(nn.BatchNorm2d(3))
    assert alone.synchronise_batch_norm(module)[0] is module[0]
    assert alone.data_parallel(module) is module


def test_join_without_torchrun_is_a_world_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = World.join("cpu")
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    world.leave()


SHAPES = [(12, 5), (12, 5, 4, 3)]


def norm_oracle(x, upstream, weight, bias):
    """Two steps of torch's own batch norm over the whole batch, in float64."""
    norm = (nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d)(x.shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    x = x.double().requires_grad_()
    for _ in range(2):
        output = norm(x)
    output.backward(upstream.double())
    return {
        "output": output.detach(),
        "grad_input": x.grad,
        "grad_weight": norm.weight.grad,
        "grad_bias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        "num_batches_tracked": norm.num_batches_tracked,
        "eval_output": norm.eval()(x).detach(),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=["1d", "2d"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("share", [6, 5], ids=["equal", "unequal"])
def test_synchronised_batch_norm_is_batch_norm_over_the_whole_batch(two_ranks, shape, channels_last, share):
    generator = torch.Generator().manual_seed(0)
    # the two ranks' values differ in mean and spread, so that local statistics would show
    x = torch.randn(shape, generator=generator) * 2 + 7
    x[share:] = x[share:] * 3 - 20
    upstream = torch.randn(shape, generator=generator)
    if channels_last and len(shape) == 4:
        x, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)

    expected = norm_oracle(x, upstream, weight, bias)
    for result in two_ranks(tiny.sync_norm, x, upstream, weight, bias, share):
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value.numpy(), rtol=1e-4, atol=2e-5, err_msg=name)


def test_the_batch_norm_oracle_tells_local_statistics_from_global_ones(alone):
    x = torch.randn((12, 5), generator=torch.Generator().manual_seed(0))
    x[6:] = x[6:] * 3 - 20
    ones, zeros = torch.ones(5), torch.zeros(5)
    local = tiny.sync_norm(alone, x[:6], torch.ones(6, 5), ones, zeros, 6)["output"]
    whole = norm_oracle(x, torch.ones(12, 5), ones, zeros)["output"][:6]
    assert (local - whole).abs().max() > 0.1


def batches_unlike_each_other() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn((8, 3, 6, 6), generator=generator) * (1 + k) + 3 * k for k in range(3)]


def test_batches_in_one_pass_are_normalised_apart(two_ranks, alone):
    expected = tiny.forward_each(alone, batches_unlike_each_other())
    assert expected["1.num_batches_tracked"] == 3
    for found in two_ranks(tiny.forward_each, batches_unlike_each_other()):
        assert found.keys() == expected.keys()
        for name, value in expected.items():  # a convolution's bias before batch norm has no gradient but rounding
            scale = max(np.linalg.norm(value.double()), 1.0)
            assert np.linalg.norm(found[name] - value.double().numpy()) <= 1e-5 * scale, name


def test_the_comparison_tells_batches_apart_from_one_large_batch(two_ranks, alone):
    expected = tiny.forward_each(alone, batches_unlike_each_other())
    (found, _) = two_ranks(tiny.forward_each, batches_unlike_each_other(), apart=False)
    assert np.abs(found["1.running_mean"] - expected["1.running_mean"].numpy()).max() > 0.1


@pytest.mark.parametrize("one_node", [True, False])
def test_an_exchange_is_an_all_gather(two_ranks, one_node):
    for found in two_ranks(tiny.exchanged, [1, 33, 300_000], one_node=one_node):  # 1.2 MB are many pieces
        *pairs, by_sockets = found
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours, theirs)
        assert [bool(used) for used in by_sockets] == [one_node]


def test_an_exchange_ends_when_its_peer_has():
    ours, theirs = socket.socketpair()
    links = exchange._Links(0, {1: ours})
    theirs.close()
    with pytest.raises(OSError, match=r"(?i)closed by peer|broken pipe"):
        links.all_gather(torch.zeros(3))
    links.close()


def test_gradient_of_two_ranks_is_that_of_one(two_ranks, alone, record_property):
    """SimCLR's gradient: one rank with a batch of 2 B, two ranks with B each, through the stage itself."""
    whole = tiny.simclr_gradient(alone, sync_bn=True).double().numpy()
    errors = [np.linalg.norm(g - whole) / np.linalg.norm(whole) for g in two_ranks(tiny.simclr_gradient, sync_bn=True)]
    record_property("relative_error", float(max(errors)))
    print(f"relative error of the gradient {max(errors):.2e}")
    assert max(errors) <= 1e-5


def test_gradient_of_two_ranks_without_synchronised_batch_norm_differs(two_ranks, alone, record_property):
    """The control of the test above: it can tell a wrong gradient."""
    whole = tiny.simclr_gradient(alone, sync_bn=False).double().numpy()
    errors = [np.linalg.norm(g - whole) / np.linalg.norm(whole) for g in two_ranks(tiny.simclr_gradient, sync_bn=False)]
    record_property("relative_error", float(min(errors)))
    print(f"relative error of the gradient without sync_bn {min(errors):.2e}")
    assert min(errors) > 1e-2


def compare(world_of_one, both):
    weights, metrics = world_of_one
    for their_weights, their_metrics in both:
        assert their_weights.keys() == weights.keys()
        for name, value in weights.items():
            np.testing.assert_allclose(their_weights[name], value.numpy(), rtol=1e-4, atol=1e-4, err_msg=name)
        assert their_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "stage",
    ["simclr", "warmup", "supervised", "teacher", "distillation", pytest.param("dpsgd", marks=pytest.mark.slow)],
)
def test_an_epoch_of_two_ranks_is_that_of_one(two_ranks, alone, stage):
    compare(tiny.train_stage(alone, stage), two_ranks(tiny.train_stage, stage))


def test_mixmatch_of_two_ranks_is_that_of_one_but_for_the_mixing_partner(two_ranks, alone):
    compare(tiny.train_mixmatch_unmixed(alone), two_ranks(tiny.train_mixmatch_unmixed))


def test_both_ranks_hold_the_same_weights_after_mixmatch(two_ranks):
    (zero, zero_metrics), (one, one_metrics) = two_ranks(tiny.train_stage, "mixmatch")
    for name, value in zero.items():
        np.testing.assert_array_equal(value, one[name], err_msg=name)
    assert zero_metrics["loss"] == one_metrics["loss"]


def test_the_filter_ranks_the_same_losses_on_two_ranks(two_ranks, alone):
    count = 37  # not shared equally
    whole = tiny.split_losses(alone, count)
    for losses in two_ranks(tiny.split_losses, count):
        np.testing.assert_allclose(losses, whole.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(two_ranks, alone, digits):
    assert two_ranks(tiny.examine, digits) == [tiny.examine(alone, digits)] * 2


def test_features_of_a_backbone_are_those_of_one_process(alone, two_ranks):
    whole = tiny.features(alone, "wide_resnet28_2")
    one, other = two_ranks(tiny.features, "wide_resnet28_2")
    np.testing.assert_allclose(np.concatenate([one, other]), whole.numpy(), rtol=1e-3, atol=1e-4)
