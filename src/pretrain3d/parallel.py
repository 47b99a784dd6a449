"""Sums over processes, and gathering, that keep a distributed loss equal to the loss of one process with the batch.

DDP averages gradients over processes. A loss that each process normalises by its own counts is then not the loss of
the global batch. Every loss is therefore a function of sums, and each sum goes through `all_sum`: all processes compute
the same global loss, and the averaged gradient is exactly its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 without a process group."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process holds the same loss, so the sum of their gradients is a multiple: no second exchange is needed.
        return gradients[0] * distributed.get_world_size()


def all_sum(value: Tensor) -> Tensor:
    """The sum of ``value`` over all processes, differentiable; ``value`` itself where there is one process.

    The caller's loss must be the same function of the sums on every process, and DDP must average the gradients.
    """
    if world_size() == 1:
        return value
    return _AllSum.apply(value)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, by rank; every process waits here for the others."""
    values = [value] * world_size()
    if len(values) > 1:
        distributed.all_gather_object(values, value)
    return values


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        pieces = [torch.empty_like(value) for _ in range(distributed.get_world_size())]
        distributed.all_gather(pieces, value.contiguous())
        return torch.stack(pieces, dim=1).flatten(0, 1)  # (B, processes, ...) -> (B * processes, ...)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # As for the sum: every process holds this gradient already, and DDP divides by the number of processes.
        size = distributed.get_world_size()
        return gradients[0].unflatten(0, (-1, size))[:, distributed.get_rank()] * size


def all_gather(value: Tensor) -> Tensor:
    """The samples of all processes, differentiable, in the order of the global batch; ``value`` itself for one process.

    The caller's loss must be the same function of the result on every process, and DDP must average the gradients.

    Args:
        value: (B, ...), the same shape on every process; sample i of process r is sample i * processes + r of the
            global batch, as `data.batch.GlobalBatches` deals them out.

    Returns:
        (B * processes, ...).
    """
    if world_size() == 1:
        return value
    return _AllGather.apply(value)
