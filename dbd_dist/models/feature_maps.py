"""Feature maps of a backbone at each of its resolutions, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMALISATION = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def layers(backbone: nn.Module, image_px: int) -> tuple[str, ...]:
    """The backbone's outermost parts, normalisation aside, whose output, a map (B, C, H, W) of more than one place, is
    the last of its resolution: of a residual network its stages. Nothing where there are none, as in transformers."""
    found: dict[int, str] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            found[output.shape[-1]] = name

    parts = [name for name, part in backbone.named_children() if not isinstance(part, NORMALISATION)]
    example = next(backbone.parameters())
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), _hooked(backbone, parts, note):
            backbone(torch.zeros(1, 3, image_px, image_px, device=example.device, dtype=example.dtype))
    finally:
        backbone.train(was_training)
    return tuple(found.values())


@contextmanager
def recorded(backbone: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """The outputs of some parts in the newest forward pass, by name."""
    outputs: dict[str, Tensor] = {}
    with _hooked(backbone, names, outputs.__setitem__):
        yield outputs


@contextmanager
def _hooked(
    backbone: nn.Module, names: tuple[str, ...] | list[str], note: Callable[[str, Any], None]
) -> Iterator[None]:
    hooks = [
        backbone.get_submodule(name).register_forward_hook(lambda module, inputs, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
