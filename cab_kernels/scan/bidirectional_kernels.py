"""The bidirectional scan on the kernels: an op that differentiates and compiles."""

import torch
from torch import Tensor

from cab_kernels.scan.launch_backward_kernels import new_gradients, selective_scan_bwd
from cab_kernels.scan.launch_forward_kernels import new_results, selective_scan_fwd
from cab_kernels.scan.launch_kernels import span_for


def _by_channel(tensor: Tensor) -> Tensor:
    """The activation with channels side by side in memory, as launches of both directions read it."""
    by_step = tensor.stride(2) == 1 and tensor.stride(1) != 1
    return tensor.mT.contiguous().mT if by_step else tensor


def _alike(pair: list[Tensor]) -> list[Tensor] | None:
    """The pair with the strides of its first, or None of none."""
    if not pair:
        return None
    first, second = pair
    if second.stride() != first.stride():
        second = torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device=first.device).copy_(second)
    return [first, second]


def _as_read(u, delta, A, B, C, D, z, delta_bias) -> tuple:
    """The inputs as the kernels take them."""
    u, delta = (_alike([_by_channel(tensor) for tensor in pair]) for pair in (u, delta))
    return u, delta, *map(_alike, (A, B, C, D)), None if z is None else _by_channel(z), _alike(delta_bias)


@torch.library.custom_op("cab_kernels::bidirectional_selective_scan", mutates_args=())
def bidirectional_selective_scan(
    u: list[Tensor],
    delta: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    z: Tensor | None,
    delta_bias: list[Tensor],
    delta_softplus: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    """``bidirectional_selective_scan_fn`` without its checks; D and delta_bias may be empty.

    Second, unless ``keep`` is 0, a state of both directions in every ``keep`` steps, for backward.
    """
    inputs = _as_read(u, delta, A, B, C, D, z, delta_bias)
    out, _, states = selective_scan_fwd(*inputs, None, None, delta_softplus, False, False, keep)
    return out, states


@bidirectional_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, keep):
    outs, _, states = new_results([_by_channel(tensor) for tensor in u], A, None, False, keep)
    return outs[0], states


@torch.library.custom_op("cab_kernels::bidirectional_selective_scan_backward", mutates_args=())
def bidirectional_selective_scan_backward(
    dout: Tensor,
    u: list[Tensor],
    delta: list[Tensor],
    A: list[Tensor],
    B: list[Tensor],
    C: list[Tensor],
    D: list[Tensor],
    z: Tensor | None,
    delta_bias: list[Tensor],
    states: Tensor,
    delta_softplus: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of ``bidirectional_selective_scan``, in the order of its arguments, and of itself none.

    Those of u, delta, B and C are two tensors, those of A, D and delta_bias one, (2, ...).
    """
    inputs = _as_read(u, delta, A, B, C, D, z, delta_bias)
    gradients = new_gradients(inputs, wanted)
    selective_scan_bwd(_by_channel(dout), None, *inputs, None, None, states, delta_softplus, False, [*gradients, None])
    return _flat(gradients)


@bidirectional_selective_scan_backward.register_fake
def _(dout, u, delta, A, B, C, D, z, delta_bias, states, delta_softplus, wanted):
    return _flat(new_gradients(_as_read(u, delta, A, B, C, D, z, delta_bias), wanted))


def _flat(gradients: list) -> list[Tensor]:
    """One by one, without what is not wanted."""
    given = [tensor for each in gradients for tensor in (each if isinstance(each, list) else [each])]
    return [tensor for tensor in given if tensor is not None]


def _grouped(values, counts) -> list:
    """The values one by one where a count is None, else so many in a list."""
    values = iter(values)
    return [next(values) if count is None else [next(values) for _ in range(count)] for count in counts]


class BidirectionalSelectiveScan(torch.autograd.Function):
    """``bidirectional_selective_scan`` with its gradient, of its tensors one by one: ``counts`` says how they pair."""

    @staticmethod
    def forward(ctx, delta_softplus, counts, *tensors):
        inputs = _grouped(tensors, counts)
        out, states = bidirectional_selective_scan(*inputs, delta_softplus, span_for(inputs[0], inputs[2]))
        ctx.delta_softplus, ctx.counts = delta_softplus, counts
        ctx.save_for_backward(*tensors, states)
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, states = ctx.saved_tensors
        inputs = _grouped(tensors, ctx.counts)
        needs = _grouped(ctx.needs_input_grad[2:], ctx.counts)
        wanted = [any(need) if isinstance(need, list) else need for need in needs]
        found = iter(bidirectional_selective_scan_backward(dout, *inputs, states, ctx.delta_softplus, wanted))
        gradients: list[Tensor | None] = []
        for given, want in zip(inputs, wanted, strict=True):
            if not isinstance(given, list):
                gradients.append(next(found) if want else None)
            elif not want:
                gradients += [None] * len(given)
            else:
                gradients += [next(found), next(found)] if given[0].dim() > 2 else next(found).unbind()
        return None, None, *gradients
