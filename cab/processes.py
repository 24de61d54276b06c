"""The processes of a run that a launcher started: which one writes, and what all of them must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def start(local_rank: int, cpu: bool) -> None:
    """Join the other processes, through gloo on a CPU and NCCL on GPUs, of which each process takes one."""
    if not cpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo" if cpu else "nccl")


def leave() -> None:
    """Part from the other processes when all have come this far."""
    if count() > 1:
        wait()
        dist.destroy_process_group()


def count() -> int:
    """How many there are; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait() -> None:
    """Go on when all have come this far."""
    if count() > 1:
        dist.barrier()


def agree(value: Value) -> Value:
    """What the first process says."""
    if count() == 1:
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held)
    return held[0]


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if count() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / count()


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The means of tensors of one dtype over the processes, in a single exchange."""
    if count() == 1 or not tensors:
        return list(tensors)
    flat = mean(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
