"""Replaying a recorded step as one CUDA graph: hundreds of kernels for the price of one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 3  # passes before the recording, in which libraries choose algorithms and allocate what they keep


class CUDAGraphedStep:
    """A forward and backward pass over inputs of one shape, recorded at the first call and replayed from then on.

    Called like the pass itself; scalars may change from call to call. After each call the parameters hold that call's
    gradients, which nobody else may free or replace (no `zero_grad`), and the returned tensors are the caller's own.

    Args:
        backward: (views, given_BK, mix=, order=, lambda_u=) -> losses, leaving gradients in the parameters of `model`.
            It may wait for nothing and must not branch on values.
        model: in train mode when called.
    """

    def __init__(self, backward: Callable[..., tuple[Tensor, ...]], model: nn.Module):
        self._backward, self._model = backward, model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._numbers: dict[str, Tensor] = {}
        self._losses: tuple[Tensor, ...] = ()

    def __call__(self, views: tuple[Tensor, ...], given_BK: Tensor, **scalars: Any) -> Any:
        given = {f"view{i}": view for i, view in enumerate(views)} | {"given": given_BK, "order": scalars["order"]}
        numbers = {name: value for name, value in scalars.items() if name != "order"}
        if self._graph is None:
            # the recording reads these addresses ever after
            self._inputs = {name: value.clone(memory_format=torch.preserve_format) for name, value in given.items()}
            self._numbers = {name: torch.full((), value, device=given_BK.device) for name, value in numbers.items()}
            self._record()
        for name, value in given.items():
            self._inputs[name].copy_(value)
        for name, value in numbers.items():
            self._numbers[name].fill_(value)
        assert self._graph is not None
        self._graph.replay()
        return tuple(loss.clone() for loss in self._losses)  # the next replay overwrites its own

    def _run(self) -> tuple[Tensor, ...]:
        views = tuple(value for name, value in self._inputs.items() if name.startswith("view"))
        return self._backward(views, self._inputs["given"], order=self._inputs["order"], **self._numbers)

    def _record(self) -> None:
        before = [buffer.clone() for buffer in self._model.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self._model.buffers(), before):  # the warm-up moved the running statistics
            buffer.copy_(value)
        self._model.zero_grad()  # so that the recording allocates the gradients that it will overwrite
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self._run()
        self._losses = tuple(loss.detach() for loss in losses)  # and let go of what the backward pass kept
        self._graph = graph
