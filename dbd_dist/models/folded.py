"""Batch norm folded into the convolutions before it."""

from __future__ import annotations

import torch
from torch import nn


def folded(model: nn.Module) -> nn.Module:
    """A frozen copy of a network in eval mode that computes the same, but for rounding, in fewer passes over its
    activations: batch norm that follows a convolution becomes part of that one's weights.

    A network that torch.fx cannot trace, as where the path depends on the input, is returned as it is.
    """
    from torch.fx.experimental.optimization import fuse  # takes time to import, and is seldom needed

    assert not model.training
    try:
        copy = fuse(model)
    except Exception:  # tracing calls the network's own code, which may raise anything then
        return model
    return copy.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
