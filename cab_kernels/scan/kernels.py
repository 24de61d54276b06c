"""Makes an op of the selective scan's launches that differentiates and compiles."""

import torch
from torch import Tensor

from cab_kernels.scan.launch_backward_kernels import new_gradients, selective_scan_bwd
from cab_kernels.scan.launch_forward_kernels import new_results, selective_scan_fwd
from cab_kernels.scan.launch_kernels import span_for


@torch.library.custom_op("cab_kernels::selective_scan", mutates_args=())
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    return_last_state: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``selective_scan_fn`` without its checks. The last state is empty unless asked for.

    Third, unless ``keep`` is 0, a state in every ``keep`` steps, for backward: ``span_for`` chooses.
    """
    return selective_scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state, keep
    )


@selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, softplus, reverse, return_last_state, keep):
    return new_results(u, A, cu_seqlens, return_last_state, keep)


@torch.library.custom_op("cab_kernels::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dout: Tensor,
    dlast_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The wanted gradients of ``selective_scan``, in the order of its arguments. It has none of its own."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    gradients = new_gradients(inputs, wanted)
    selective_scan_bwd(dout, dlast_state, *inputs, cu_seqlens, states, delta_softplus, reverse, gradients)
    return [gradient for gradient in gradients if gradient is not None]


@selective_scan_backward.register_fake
def _(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, states, softplus, reverse, wanted
):
    gradients = new_gradients((u, delta, A, B, C, D, z, delta_bias, initial_state), wanted)
    return [gradient for gradient in gradients if gradient is not None]


class SelectiveScan(torch.autograd.Function):
    """``(out, last_state)`` of ``selective_scan``, with their gradient.

    An ``autograd.Function`` costs Python a third of what a gradient registered with ``torch.library`` does, which lists
    the op's arguments anew for each of them.
    """

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.delta_softplus, ctx.reverse, ctx.return_last_state = arguments
        out, last_state, states = selective_scan(*arguments, span_for(tensors[0], tensors[2]))
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return out, last_state

    @staticmethod
    def backward(ctx, dout, dlast_state):
        tensors = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:9])
        dout = torch.zeros_like(tensors[0]) if dout is None else dout
        dlast_state = dlast_state if ctx.return_last_state else None
        gradients = iter(selective_scan_backward(dout, dlast_state, *tensors, ctx.delta_softplus, ctx.reverse, wanted))
        return *(next(gradients) if want else None for want in wanted), None, None, None, None
