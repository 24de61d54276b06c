"""DeepSpeed's ZeRO-3, which :mod:`cab.processes` shares a model out by where it was launched, in the place of FSDP2.

DeepSpeed partitions every parameter, each process' part a vector, and gathers those of a block while it computes.
Gradients are reduced to the same parts, and the run's own optimiser updates these: DeepSpeed's would step once more on
the last gradient of a parameter that has none at this step, as the head's or the bridges' in one of two stages.
"""

from __future__ import annotations

import inspect
import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

REDUCED = 2**23  # gradients, at least, that are reduced at a time, but for the last ones


def start() -> None:
    """Make DeepSpeed a part of the processes that have joined."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Of collectives that DeepSpeed calls by the names that they had.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__ = {}  # on a CPU it would compile collectives of its own first
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False)


class Partition:
    """The partitioned parameters of a module, and when they are whole.

    Args:
        module: in the memory of the machine or on the device.
        blocks: of it, whose parameters are whole while they compute, forward or backward.
        kept: the other parameters to be partitioned, whole from the module's forward pass to the end of backward.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], kept: Sequence[nn.Parameter]) -> None:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.utils import set_z3_leaf_module

        for block in blocks:  # a block is gathered as one, whoever reads its parameters
            set_z3_leaf_module(block, True)
        self.offload = DeepSpeedZeRoOffload(
            nn.ModuleList([*blocks, nn.ParameterList(kept)]),
            timers=None,
            ds_config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3, "memory_efficient_linear": False},
            },
            max_reuse_distance=0,
            param_persistence_threshold=0,
        )
        _forget()
        self.kept = list(kept)
        self.ready: list[Any] = []
        self.in_backward = False
        collect = weakref.WeakMethod(self._collect)  # Python cannot free a cycle through such a hook
        for value in self.offload.module.parameters():
            part(value).ds_shape = value.ds_shape
            if value.requires_grad:
                value.register_post_accumulate_grad_hook(lambda value: cast(Any, collect())(value))
        module.register_forward_pre_hook(self._begin)

    def let_go(self) -> None:
        """No parameter is whole any more."""
        self.offload.release_backward_leftovers()
        self.offload.partition_all_parameters()

    @contextmanager
    def kept_whole(self) -> Iterator[None]:
        """All parameters are whole inside."""
        values = list(self.offload.module.parameters())
        self.offload.destroy()  # its hooks, which would let go of a block behind its turn
        values[0].all_gather(values)
        try:
            yield
        finally:
            self.let_go()
            self.offload.setup_zero_stage3_hooks()
            _forget()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self.offload.get_param_coordinator().reset_step()
        if self.kept:
            cast(Any, self.kept[0]).all_gather(self.kept)

    def _collect(self, value: Any) -> None:
        if not self.in_backward:
            self.in_backward = True
            Variable._execution_engine.queue_callback(self._end)
        self.ready.append(value)
        if sum(waiting.ds_numel for waiting in self.ready) >= REDUCED:
            self._reduce()

    def _end(self) -> None:
        self.in_backward = False
        if self.ready:
            self._reduce()
        self.let_go()

    @torch.no_grad()
    def _reduce(self) -> None:
        from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

        means = reduce_scatter_coalesced([value.grad for value in self.ready])
        for value, mean in zip(self.ready, means, strict=True):
            own = part(value)
            own.grad = torch.zeros_like(own) if own.grad is None else own.grad
            own.grad[: len(mean)] += mean
            value.grad = None
        self.ready = []


def _forget() -> None:
    """Take from DeepSpeed the module that just got its hooks, and those before it: it keeps every model of a run."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    FWD_MODULE_STACK.pop()
    cached = Coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()


def is_shared(value: Any) -> bool:
    """Whether a tensor is a partitioned parameter, or this process' part of one."""
    return hasattr(value, "ds_shape")


def shape(value: Any) -> torch.Size:
    """Of a partitioned parameter, also from this process' part of it."""
    return value.ds_shape


def part(value: Any) -> Any:
    """This process' part of a partitioned parameter, a vector, which may end beyond the parameter."""
    return value.ds_tensor


def whole(value: Tensor, own: Any) -> Tensor:
    """The whole of which ``value`` is this process' part, on the CPU, where ``own`` is that of the parameter."""
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)[: shape(own).numel()].view(shape(own)).cpu()


def cut(value: Tensor, own: Any) -> Tensor:
    """The reverse of :func:`whole`, on the device of ``own``."""
    start = dist.get_rank() * len(own)
    piece = value.flatten()[start : start + len(own)]
    found = torch.zeros_like(own, dtype=value.dtype)
    found[: len(piece)] = piece
    return found


def clip_gradients(parts: Sequence[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of all processes' parts down to a norm of ``max_norm``, and return what it was."""
    held = [value for value in parts if value.grad is not None]
    norm = nn.utils.get_total_norm([cast(Tensor, value.grad) for value in held])
    squares = norm.square()
    dist.all_reduce(squares)
    nn.utils.clip_grads_with_norm_(held, max_norm, squares.sqrt())
    return squares.sqrt()
