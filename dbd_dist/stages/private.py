"""Opacus' optimiser for any number of ranks: gradients clipped image by image, summed over the ranks, then noised."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from dbd_dist.distributed.world import World


def private_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    clip: float,
    noise: float,
    expected_batch: int,
) -> tuple[nn.Module, Any]:
    """`model` with a gradient for each image, and `optimizer` with clipping and noise.

    Opacus' own optimiser for several ranks draws the noise on one of them. This one draws the same noise on all, from
    a generator that is seeded before each step (``seed``), so that results are those of one process.

    Args:
        clip: largest norm of an image's gradient.
        noise: standard deviation of the noise on the sum, over `clip`.
        expected_batch: the sum is divided by it.
    """
    network = _per_sample(model)
    return network, _noised(optimizer, world, clip=clip, noise=noise, expected_batch=expected_batch)


def _per_sample(model: nn.Module) -> nn.Module:
    from opacus import GradSampleModule

    class PerSample(GradSampleModule):
        """Takes gradients of layers from hooks on their outputs: a module's own backward hook forbids what residual
        blocks do, to add to an output in place. Opacus' gradient of a convolution is wrong for tensors that are
        channels_last in memory: it is given contiguous ones."""

        def capture_activations_hook(self, module: nn.Module, forward_input: Any, _forward_output: Any) -> None:
            super().capture_activations_hook(module, [x.contiguous() for x in forward_input], _forward_output)

        def add_hooks(self, *, loss_reduction="mean", batch_first=True, force_functorch=False) -> None:
            how = {"loss_reduction": loss_reduction, "batch_first": batch_first}
            super().add_hooks(**how, force_functorch=force_functorch)
            handles = self.autograd_grad_sample_hooks  # of each layer that of the forward, then that of the backward
            for backward, layer in zip(handles[1::2], self.iterate_submodules(self._module)):
                backward.remove()
                handles.append(layer.register_forward_hook(partial(self._watch, how)))

        def _watch(self, how: dict[str, Any], layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if layer.training and output.requires_grad:
                capture: Any = self.capture_backprops_hook
                output.register_hook(lambda grad: capture(layer, None, (grad.contiguous(),), **how))

    return PerSample(model, loss_reduction="sum")


def _noised(optimizer: torch.optim.Optimizer, world: World, *, clip: float, noise: float, expected_batch: int) -> Any:
    from opacus.optimizers import DPOptimizer

    generator = torch.Generator(world.device)

    class WorldOptimizer(DPOptimizer):
        def seed(self, seed: int) -> None:
            """Draw the next step's noise from this seed."""
            generator.manual_seed(seed)

        def add_noise(self) -> None:
            params: list[Any] = self.params
            flat = world.sum(torch.cat([p.summed_grad.flatten() for p in params]))
            for p, whole in zip(params, flat.split([p.numel() for p in params])):
                p.summed_grad = whole.view_as(p)
            super().add_noise()

    return WorldOptimizer(
        optimizer,
        noise_multiplier=noise,
        max_grad_norm=clip,
        expected_batch_size=expected_batch,
        loss_reduction="mean",
        generator=generator,
    )
