"""The processes of a run that a launcher started: which one writes, what all of them must agree on, and how they share
a model out: by FSDP2, or by DeepSpeed's ZeRO-3 (:mod:`cab.zero`) where that was launched."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

import cab.zero as zero
from cab.config import UserError

Value = TypeVar("Value")

# Parameters, at least, that are gathered at a time: small blocks are not worth an exchange each.
GATHERED = 2**23
SETTLED = 0.1  # seconds after which gloo has let go of what it exchanged

_PARTITION = "_cab_partition"  # where a module has it
_by_deepspeed = False  # the launcher's choice, for all models of the run


def start(local_rank: int, cpu: bool, by_deepspeed: bool = False) -> None:
    """Join the other processes, through gloo on a CPU and NCCL on GPUs, of which each process takes one.

    Args:
        local_rank: among those of this machine.
        cpu: whether models run on the CPU.
        by_deepspeed: whether models are shared out by DeepSpeed's ZeRO-3, not by FSDP2.
    """
    global _by_deepspeed
    _by_deepspeed = by_deepspeed
    if by_deepspeed:
        import deepspeed  # noqa: F401  where it is missing, that is said before the processes join
    if cpu:
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local_rank))
    if by_deepspeed:
        zero.start()


def leave(together: bool = True) -> None:
    """Part from the other processes: when all have come this far, or at once, where this one was refused something."""
    if dist.is_initialized():
        by_gloo = dist.get_backend() == "gloo"
        if by_gloo:
            # Its threads need Python's lock to let go of the last tensors that were exchanged. If a barrier comes
            # first, they pass them on to it, and one that would free them when Python has begun to end aborts.
            time.sleep(SETTLED)
        if together:
            wait()
        if together or by_gloo:  # NCCL would wait for the others
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


def first(call: Callable[[], Value]) -> Value:
    """What a call gives in the first process, the only one in which it is made.

    Raises:
        UserError: the call raised it; so do all processes.
        OSError: likewise.
    """
    if count() == 1:
        return call()
    held: list[Any] = [None, None]
    if rank() == 0:
        try:
            held[0] = call()
        except (UserError, OSError) as error:
            held[1] = error
    dist.broadcast_object_list(held)
    value, refusal = held
    if refusal is not None:
        raise refusal
    return value


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


def average_gradients(module: nn.Module) -> None:
    """Put the mean over the processes in the place of every gradient of a module, in a single exchange."""
    held = [value for value in module.parameters() if value.grad is not None]
    for value, gradient in zip(held, average([cast(Tensor, value.grad) for value in held]), strict=True):
        value.grad = gradient


def shard(module: nn.Module, device: torch.device, *methods: str, last: int | None = None) -> None:
    """Leave each process with its part of every parameter, on ``device``.

    The parameters of a few blocks are whole while these compute, those outside the blocks from the forward pass to the
    end of the backward pass; gradients are means over the processes. What is frozen outside the blocks stays whole, so
    that it may be used by itself.

    Args:
        module: on any device; its blocks are its largest list of modules.
        device: of this process.
        methods: that are called in the place of forward, too.
        last: the block of which backward may ask for more than the gradient of its output, by default the last one; it
            and those behind it, whose output may then have no gradient, stay whole until backward.
    """
    if _by_deepspeed:
        _shard_by_deepspeed(module, device, last)
        return
    # It is about B and C, which Vim's blocks return: nobody writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (count(),))
    for group, is_let_go in _groups(module, last):
        fully_shard(group, mesh=mesh, reshard_after_forward=is_let_go)
    frozen = {value for value in module.parameters() if not isinstance(value, DTensor) and not value.requires_grad}
    for value in frozen:
        value.data = value.data.to(device)
    fully_shard(module, mesh=mesh, ignored_params=frozen)
    for method in methods:
        register_fsdp_forward_method(module, method)


def _shard_by_deepspeed(module: nn.Module, device: torch.device, last: int | None) -> None:
    """:func:`shard`, by ZeRO-3."""
    trained = {value: None for value in module.parameters() if value.requires_grad}  # once each, in their order
    blocks = [block for group, is_let_go in _groups(module, last) if is_let_go or not trained for block in group]
    inside = {value for block in blocks for value in block.parameters()}
    partition = zero.Partition(module, blocks, [value for value in trained if value not in inside])
    module.to(device)  # what is not partitioned
    module.__dict__[_PARTITION] = partition


def _partition(module: nn.Module) -> zero.Partition | None:
    """What ZeRO-3 has made of a module, None where it has not."""
    return module.__dict__.get(_PARTITION)


def reshard(module: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has left whole, before the parameters change."""
    partition = _partition(module)
    if partition is not None:
        partition.let_go()
        return
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def kept_whole(module: nn.Module, last: int | None = None) -> Iterator[None]:
    """All parameters that a pass inside gathers stay whole until the end, to be differentiated by; ``last`` as it was
    for :func:`shard`."""
    partition = _partition(module)
    if partition is not None:
        with partition.kept_whole():
            yield
        return
    if not isinstance(module, FSDPModule):
        yield
        return
    _let_go(module, False, last)
    try:
        yield
    finally:
        _let_go(module, True, last)
        reshard(module)


def make_whole(module: nn.Module) -> None:
    """Put the whole parameters back into a module, on the CPU, that is to be saved; a sharded one runs no more."""
    if not isinstance(module, FSDPModule) and _partition(module) is None:
        module.cpu()
        return
    reshard(module)
    made: dict[int, nn.Parameter] = {}  # a parameter may have two places
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            if id(value) not in made:
                made[id(value)] = nn.Parameter(whole(own(value)), value.requires_grad)
            setattr(part, name, made[id(value)])


def own(value: nn.Parameter) -> Any:
    """What this process has of a parameter, without its graph, to be changed in place."""
    return zero.part(value) if zero.is_shared(value) else value.detach()


def shape(value: Any) -> Any:
    """Of the whole parameter, or of that of which :func:`own` gave this."""
    return zero.shape(value) if zero.is_shared(value) else getattr(value, "shape", None)


def by_deepspeed() -> bool:
    """Whether the parts are ZeRO-3's: gradients are theirs, and an optimiser must be told by :func:`own_parts`."""
    return _by_deepspeed


def own_parts(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser of partitioned parameters, which has not stepped yet, update this process' part of them."""
    for group in optimizer.param_groups:
        group["params"] = [own(value) for value in group["params"]]
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())  # Trainer clears the parameters' alone


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients of partitioned parameters down to a norm of ``max_norm``, and return what it was."""
    return zero.clip_gradients([own(value) for value in parameters if zero.is_shared(value)], max_norm)


def whole(value: Any, of: Any = None) -> Any:
    """All of a tensor of which this process has a part, on the CPU; every process must ask for it.

    Args:
        value: what :func:`own` gave, or laid out like that, or any tensor or number that every process has.
        of: what :func:`own` gave, where that is not ``value``.
    """
    of = value if of is None else of
    if zero.is_shared(of) and isinstance(value, Tensor) and value.shape == of.shape:
        return zero.whole(value, of)
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def weights(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a module holds, whole, each tensor under one of its names; every process must ask for it."""
    held: dict[int, tuple[str, Any]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        held.setdefault(id(value), (name, value))
    return {name: whole(own(value)).contiguous() for name, value in held.values()}


def load_weights(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Take over what :func:`weights` gave, strictly: of a sharded module, the part of this process."""
    held = module.state_dict(keep_vars=True)
    given = {id(held[name]): value for name, value in state.items() if name in held}
    named = {name: given[id(value)] for name, value in held.items() if id(value) in given}
    module.load_state_dict({name: _taken(value, held.get(name)) for name, value in {**state, **named}.items()})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint of an optimiser holds, whole; every process must ask for it."""
    values, state = _values(optimizer), optimizer.state_dict()
    of_each = {
        index: {name: whole(value, values[index]) for name, value in held.items()}
        for index, held in state["state"].items()
    }
    return {**state, "state": of_each}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over what :func:`optimizer_state` gave: of sharded parameters, the part of this process."""
    values = _values(optimizer)
    of_each = {
        index: {name: cut(value, values[index]) for name, value in held.items()}
        for index, held in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_each})


def _values(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [value for group in optimizer.param_groups for value in group["params"]]


def cut(value: Any, held: Any) -> Any:
    """The reverse of :func:`whole`: this process' part of ``value``, where it has a part of ``held``."""
    if not isinstance(value, Tensor) or value.shape != shape(held):
        return value
    if zero.is_shared(held):
        return zero.cut(value, held)
    if not isinstance(held, DTensor):
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def _taken(value: Tensor, held: Any) -> Tensor:
    """What a module shall load for its parameter ``held``; a partitioned one takes its part here and is empty."""
    if not zero.is_shared(held) or value.shape != shape(held):
        return cut(value, held)
    own(held).copy_(cut(value, own(held)))
    return held.detach()


def _let_go(module: FSDPModule, after: bool, last: int | None) -> None:
    """Whether a pass lets go of what it has gathered."""
    module.set_reshard_after_backward(after)
    for group, is_let_go in _groups(cast(nn.Module, module), last):
        for block in group if is_let_go else ():
            block.set_reshard_after_forward(after)


def _groups(module: nn.Module, last: int | None) -> list[tuple[list[Any], bool]]:
    """Blocks that are gathered together, and whether forward lets go of them: they are all before ``last``."""
    lists = [part for part in module.modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    blocks = list(max(lists, key=_size, default=()))
    groups: list[list[Any]] = []
    for block in blocks:
        if not groups or sum(map(_size, groups[-1])) >= GATHERED:
            groups.append([])
        groups[-1].append(block)
    before = blocks[: len(blocks) - 1 if last is None else last]
    return [(group, group[-1] in before) for group in groups]


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
