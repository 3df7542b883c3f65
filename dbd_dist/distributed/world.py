"""The world that a training process belongs to. Beside batch_norm.py and exchange.py, which serve it, the only place
that talks to `torch.distributed`.

A world of one runs the same code as a world of many; nothing else in the project asks whether there is a process group.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from data_prep.errors import UserError
from dbd_dist.distributed import exchange
from dbd_dist.distributed.batch_norm import SyncBatchNorm, batches_in_one

Module = TypeVar("Module", bound=nn.Module)

TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(days=1)
"""Of the exchanges beside NCCL's, about once a second: a rank that hangs is for the watchdog, or NCCL, to find."""
_joined = itertools.count()
_cpu_groups: dict[Any, Any] = {}


def check_device(device: Literal["auto", "cpu", "cuda"]) -> None:
    """Refuse CUDA where there is none.

    Raises:
        UserError
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device", where="compute.device", expected="auto, cpu")


@dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is among the processes that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def current(cls, device: torch.device) -> World:
        """The world of the process group that is up, or a world of one where there is none."""
        if not dist.is_initialized():
            return cls(device=device)
        return cls(
            rank=dist.get_rank(),
            size=dist.get_world_size(),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            device=device,
        )

    @classmethod
    def join(cls, device: Literal["auto", "cpu", "cuda"], timeout: timedelta = TIMEOUT) -> World:
        """The world that `torchrun` (RANK, WORLD_SIZE, LOCAL_RANK in the environment) starts, or a world of one.

        Args:
            timeout: how long a collective waits for the other ranks.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        check_device(device)
        if cuda:
            torch.cuda.set_device(local_rank)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            # torchrun's store outlives a group that was left: the next one would find old addresses under its keys
            store = PrefixStore(f"world {next(_joined)}", store)
            dist.init_process_group(
                "nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
            )
        return cls.current(torch.device("cuda", local_rank) if cuda else torch.device("cpu"))

    def leave(self) -> None:
        """Undo `join`."""
        exchange.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and reports."""
        return self.rank == 0

    def gather_with_grad(self, x: Tensor) -> Tensor:
        """(b, ...) on every rank -> (size * b, ...) in rank order; gradients flow back to the rank that they belong to.

        The backward sums what all ranks send, so together with the averaging of data parallelism a loss that each
        rank takes over its own anchors has the gradient of the single-process loss (lightning-style gathers, which
        hand back only the local slice, lose a factor of `size`).
        """
        if self.size == 1:
            return x
        return _Gather.apply(x)  # type: ignore[return-value]

    def gather(self, x: Tensor) -> Tensor:
        """(b_r, ...) on rank r -> (sum of b_r, ...) in rank order, without gradient; the b_r may differ."""
        if self.size == 1:
            return x
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        longest = max(int(c) for c in counts)
        padded = torch.zeros((longest, *x.shape[1:]), dtype=x.dtype, device=x.device)
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(c)] for part, c in zip(parts, counts, strict=True)])

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over the ranks, without gradient."""
        return x if self.size == 1 else self.sum(x) / self.size

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, without gradient."""
        if self.size == 1:
            return x
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (any small picklable thing) on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks. Does not wait for a GPU: it goes through the CPU."""
        if self.size == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_cpu_group())
        return x.tolist()

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every rank rank 0's buffers (batch norm's running statistics where they are a rank's own)."""
        if self.size == 1:
            return
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def data_parallel(self, module: Module) -> Module:
        """`module` with gradients averaged over the ranks; itself in a world of one.

        Batch-norm buffers are not broadcast: with `synchronise_batch_norm` they agree anyway, and a broadcast between
        the several forwards of one MixMatch step would change tensors that its backward still needs.
        """
        if self.size == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.14 renames the option; the oldest release that we support does not know the new name
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            # called like the module; the caller keeps the bare module for everything else
            return nn.parallel.DistributedDataParallel(  # type: ignore[return-value]
                module, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def no_sync(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of passes inside stay on this rank, to be averaged with those of the first pass after it."""
        return nullcontext() if self.size == 1 else network.no_sync()  # type: ignore[operator]

    def synchronise_batch_norm(self, module: Module) -> Module:
        """Replace every batch norm by one whose statistics are those of the global batch."""
        if self.size == 1:
            return module
        if self.device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[return-value]
        SyncBatchNorm.convert(module)
        return module

    def forward_each(self, network: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of `network` for batches of one length, as if called once for each.

        On CPU ranks with synchronised batch norm it is one call: the statistics of all batches, which stay apart, are
        then exchanged together.
        """
        synchronised = isinstance(network, nn.Module) and any(isinstance(m, SyncBatchNorm) for m in network.modules())
        if self.size == 1 or not synchronised:
            return [network(batch) for batch in batches]
        with batches_in_one(len(batches)):
            return list(network(torch.cat(tuple(batches))).chunk(len(batches)))


def _cpu_group() -> Any:
    """The process group itself where it is gloo's, else one of gloo's beside it, made when all ranks first ask."""
    if dist.get_backend() == "gloo":
        return None
    group = dist.group.WORLD
    if group not in _cpu_groups:
        _cpu_groups.clear()  # of a world that was left
        _cpu_groups[group] = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return _cpu_groups[group]


class _Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; the backward sums over the ranks what each row was used for.

    torch's own differentiable gather is deprecated, and its backward misreads gradients that are not contiguous.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, *grads: Any):
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)
