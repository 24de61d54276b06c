"""The bridge loss on a GPU: which kernels run, the ``torch.library`` op, and its gradients.

Everything is done in the forward pass: the loss and, unscaled, the gradients that will be asked for. Backward makes one
launch, which multiplies them by ``2 * incoming / (counted tokens * width)`` and casts them; for large bridges in
bfloat16 whose hidden layer is no wider than x it scales w1 instead of dx, and a last product makes dx. So neither the
target nor anything wider than x is kept. What is kept becomes the gradients of x where it lies, unless the graph is
retained and may be walked again.

Symbols of arXiv:2510.19266 and ours: phi_B, phi_C = a bridge; B, C = x; K, Q = target.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from cab_kernels.bridge.chunked_kernels import bridge_mse_chunked, is_deferred, is_small, make_deferred_dx
from cab_kernels.bridge.fused_kernels import MAX_HIDDEN, MAX_WEIGHT, bridge_mse_fused
from cab_kernels.bridge.matching_kernels import Call, gradient_sizes
from cab_kernels.bridge.sums_kernels import add_up, scale

NEEDS_X, NEEDS_W1, NEEDS_B1, NEEDS_W2, NEEDS_B2 = 1, 2, 4, 8, 16
FUSED_DTYPES = (torch.bfloat16, torch.float16)  # float32 operands would double every register; cuBLAS does them


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes a tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _fused(w1: torch.Tensor, compute: torch.dtype) -> bool:
    """Whether a bridge stays on chip; in comparisons that sizes without a value, as a compiler has them, can take."""
    hidden, d_state = w1.shape[-2:]
    widest = MAX_WEIGHT // (64 if hidden <= 64 else MAX_HIDDEN)
    return compute in FUSED_DTYPES and hidden <= MAX_HIDDEN and d_state <= widest


def _deferred(w1: torch.Tensor, compute: torch.dtype) -> bool:
    """Whether backward makes dx from dz."""
    return not _fused(w1, compute) and is_deferred(w1.shape[1], w1.shape[2], compute)


def _empty_kept(xs: list[torch.Tensor], w1: torch.Tensor, w2: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """What is kept for the gradients of x: their stack, unscaled, or that of dz where backward makes them from it.

    dx is channels first like x where x is, if the kernel can write that. Scaling in backward rounds it once more. The
    fused kernels round so little before that this does not matter, and in large bridges it is one rounding among many;
    in small ones that go through cuBLAS, dx is kept in float32 for it.
    """
    x = xs[0]
    batch, length, d_state = x.shape
    if _deferred(w1, compute):
        return x.new_empty((len(xs), batch, length, w1.shape[1]), dtype=compute)
    if _fused(w1, compute):
        if x.stride(1) < x.stride(2):
            return x.new_empty((len(xs), batch, d_state, length), dtype=compute).transpose(2, 3)
    elif is_small(w1.shape[1], d_state, w2.shape[1]):
        compute = torch.float32
    return x.new_empty((len(xs), batch, length, d_state), dtype=compute)


def _alike(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors themselves if their strides agree, else contiguous ones."""
    if all(tensor.stride() == tensors[0].stride() for tensor in tensors):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def _forward(
    xs: list[torch.Tensor],
    w1: list[torch.Tensor],
    b1: list[torch.Tensor],
    w2: list[torch.Tensor],
    b2: list[torch.Tensor],
    targets: list[torch.Tensor],
    mask: torch.Tensor | None,
    token_index: torch.Tensor | None,
    target_mean: torch.Tensor | None,
    target_rstd: torch.Tensor | None,
    compute: torch.dtype,
    needs: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (bridges,), factors (bridges,), what is kept for the gradients of x, and unscaled weight gradients.

    ``needs`` says by NEEDS_* which gradients to make; those not made are of size 0, or undefined inside a row.
    """
    with torch.autocast(xs[0].device.type, enabled=False), device_of(xs[0]):
        call = Call(
            _alike([x.to(compute) for x in xs]),
            *([weight.contiguous() for weight in stacks] for stacks in (w1, b1, w2, b2)),
            _alike(targets),
            None if mask is None else mask.contiguous(),
            None if token_index is None else token_index.contiguous(),
            None if target_mean is None else target_mean.contiguous(),
            None if target_rstd is None else target_rstd.contiguous(),
        )
        kept = _empty_kept(xs, w1[0], w2[0], compute) if needs & NEEDS_X else None
        needs_w1, needs_w2 = bool(needs & (NEEDS_W1 | NEEDS_B1)), bool(needs & (NEEDS_W2 | NEEDS_B2))
        totals = None
        if needs_w1 or needs_w2:
            totals = w1[0].new_empty((len(xs), sum(gradient_sizes(call))), dtype=torch.float32)
        if _fused(w1[0], compute):
            partials = bridge_mse_fused(call, kept, needs_w1, needs_w2)
        else:
            partials = bridge_mse_chunked(call, kept, totals, needs_w1, needs_w2)
        loss, factor = add_up(call, partials, totals)
    return (
        loss,
        factor,
        xs[0].new_empty((0,), dtype=compute) if kept is None else kept,
        w1[0].new_empty((0,), dtype=torch.float32) if totals is None else totals,
    )


_forward_op = torch.library.custom_op("cab_kernels::bridge_mse", _forward, mutates_args=())


@_forward_op.register_fake
def _(xs, w1, b1, w2, b2, targets, mask, token_index, target_mean, target_rstd, compute, needs):
    _, hidden, d_state = w1[0].shape
    kept = _empty_kept(xs, w1[0], w2[0], compute) if needs & NEEDS_X else xs[0].new_empty((0,), dtype=compute)
    size = hidden * (d_state + 1) + w2[0].shape[1] * (hidden + 1)
    shape = (len(xs), size) if needs & ~NEEDS_X else (0,)
    loss, factor = (w1[0].new_empty((len(xs),), dtype=torch.float32) for _ in range(2))
    return loss, factor, kept, w1[0].new_empty(shape, dtype=torch.float32)


def _backward(
    incoming: torch.Tensor,
    factor: torch.Tensor,
    kept: torch.Tensor,
    totals: torch.Tensor,
    w1: torch.Tensor,
    width: int,
    x_dtype: torch.dtype,
    compute: torch.dtype,
    needs: int,
    retained: bool,
) -> list[torch.Tensor]:
    """The gradients that ``needs`` names, in its order, of all bridges, times the factor and the incoming gradient.

    Unless ``retained``, ``kept`` itself may become one of them.
    """
    bridges, (hidden, d_state) = len(factor), w1.shape[1:]
    deferred = bool(needs & NEEDS_X) and _deferred(w1, compute)
    in_place = bool(needs & NEEDS_X) and not deferred and not retained and kept.dtype == x_dtype
    outs = _empty_gradients(factor, kept, w1, width, x_dtype, compute, needs & ~NEEDS_X if in_place else needs)
    if in_place:
        outs[0] = kept
    source, scaled = kept, list(outs)
    if deferred:
        source, scaled[0] = w1.contiguous(), w1.new_empty(w1.shape, dtype=compute)
    with device_of(factor):
        sizes = (source.numel() // bridges, hidden * d_state, hidden, width * hidden, width)
        scale(incoming, factor, source, totals, scaled, sizes)
        if deferred:
            make_deferred_dx(kept, scaled[0], outs[0])
    return [out for out in outs if out is not None]


@torch.library.custom_op("cab_kernels::bridge_mse_backward", mutates_args=())
def _backward_op(
    incoming: torch.Tensor,
    factor: torch.Tensor,
    kept: torch.Tensor,
    totals: torch.Tensor,
    w1: torch.Tensor,
    width: int,
    x_dtype: torch.dtype,
    compute: torch.dtype,
    needs: int,
) -> list[torch.Tensor]:
    return _backward(incoming, factor, kept, totals, w1, width, x_dtype, compute, needs, retained=True)


@_backward_op.register_fake
def _(incoming, factor, kept, totals, w1, width, x_dtype, compute, needs):
    return [out for out in _empty_gradients(factor, kept, w1, width, x_dtype, compute, needs) if out is not None]


def _empty_gradients(
    factor: torch.Tensor,
    kept: torch.Tensor,
    w1: torch.Tensor,
    width: int,
    x_dtype: torch.dtype,
    compute: torch.dtype,
    needs: int,
) -> list[torch.Tensor | None]:
    """Space for dx, dw1, db1, dw2 and db2; None for those that nobody needs."""
    bridges, (hidden, d_state) = factor.shape[0], w1.shape[1:]
    outs: list[torch.Tensor | None] = [None]
    if needs & NEEDS_X:
        deferred = _deferred(w1, compute)
        shape = (*kept.shape[:-1], d_state)
        outs = [kept.new_empty(shape, dtype=x_dtype) if deferred else torch.empty_like(kept, dtype=x_dtype)]
    shapes = ((bridges, hidden, d_state), (bridges, hidden), (bridges, width, hidden), (bridges, width))
    for bit, shape in zip((NEEDS_W1, NEEDS_B1, NEEDS_W2, NEEDS_B2), shapes, strict=True):
        outs.append(w1.new_empty(shape) if needs & bit else None)
    return outs


class BridgeMSEFunction(torch.autograd.Function):
    """The losses; their gradients are already there when backward comes.

    Compiled, both directions go through their ``torch.library`` ops; called directly, they do not, because the
    dispatcher's work on lists of tensors would take as long as the kernels do.
    """

    @staticmethod
    def forward(ctx, bridges, stacks, compute, needs, mask, token_index, target_mean, target_rstd, *lists):
        forward = _forward_op if torch.compiler.is_compiling() else _forward
        xs, w1, b1, w2, b2, targets = _cut(lists, (bridges, *[stacks] * 4))
        loss, factor, kept, totals = forward(
            xs, w1, b1, w2, b2, targets, mask, token_index, target_mean, target_rstd, compute, needs
        )
        ctx.save_for_backward(factor, kept, totals, w1[0])
        ctx.width, ctx.x_dtype, ctx.compute = w2[0].shape[1], xs[0].dtype, compute
        ctx.bridges, ctx.stacks, ctx.targets, ctx.needs = bridges, stacks, len(targets), needs
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        arguments = (incoming, *ctx.saved_tensors, ctx.width, ctx.x_dtype, ctx.compute, ctx.needs)
        if torch.compiler.is_compiling():
            outs = iter(_backward_op(*arguments))
        else:
            # What PyTorch itself asks before a compiled backward gives its buffers away.
            retained = torch._C._autograd._get_current_graph_task_keep_graph()
            outs = iter(_backward(*arguments, retained))
        gradients: list[torch.Tensor | None] = []
        gradients += next(outs).unbind() if ctx.needs & NEEDS_X else [None] * ctx.bridges
        for bit in (NEEDS_W1, NEEDS_B1, NEEDS_W2, NEEDS_B2):
            gradients += next(outs).split(ctx.bridges // ctx.stacks) if ctx.needs & bit else [None] * ctx.stacks
        return *[None] * 8, *gradients, *[None] * ctx.targets


def bridge_mse_triton(
    xs: list[torch.Tensor],
    w1: list[torch.Tensor],
    b1: list[torch.Tensor],
    w2: list[torch.Tensor],
    b2: list[torch.Tensor],
    targets: list[torch.Tensor],
    mask: torch.Tensor | None,
    token_index: torch.Tensor | None,
    target_mean: torch.Tensor | None,
    target_rstd: torch.Tensor | None,
) -> torch.Tensor:
    """Losses (bridges,), float32; the arguments of :func:`cab_kernels.bridge_mse_grouped`, whose stacks are one size.

    There is one stack, or one for each target.
    """
    if xs[0].dim() == 2:
        xs, targets = [x.unsqueeze(0) for x in xs], [target.unsqueeze(0) for target in targets]
        mask = None if mask is None else mask.unsqueeze(-2)
    device = xs[0].device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else xs[0].dtype
    if len(w1) > 1 and not _fused(w1[0], compute):  # they have no launch to share
        share = len(xs) // len(w1)
        losses = []
        for i, weights in enumerate(zip(w1, b1, w2, b2, strict=True)):
            own, first = slice(i, i + 1), i * share
            options = (_part(mask, 2, first, share), _part(token_index, 1, first, share))
            options += (_part(target_mean, 1, i, 1), _part(target_rstd, 1, i, 1))
            one = bridge_mse_triton(xs[first : first + share], *([stack] for stack in weights), targets[own], *options)
            losses.append(one)
        return torch.cat(losses)
    needs = 0
    if torch.is_grad_enabled():
        for bit, values in ((NEEDS_X, xs), (NEEDS_W1, w1), (NEEDS_B1, b1), (NEEDS_W2, w2), (NEEDS_B2, b2)):
            needs |= bit if any(value.requires_grad for value in values) else 0
    options = (mask, token_index, target_mean, target_rstd)
    return BridgeMSEFunction.apply(len(xs), len(w1), compute, needs, *options, *xs, *w1, *b1, *w2, *b2, *targets)


def _cut(values: Sequence[torch.Tensor], counts: Sequence[int]) -> list[list[torch.Tensor]]:
    """The first so many, the next so many, ..., and all that remain."""
    ends = [0, *itertools.accumulate(counts), len(values)]
    return [list(values[first:end]) for first, end in itertools.pairwise(ends)]


def _part(value: torch.Tensor | None, axes: int, first: int, count: int) -> torch.Tensor | None:
    """What all share, of so many axes, whole; else some of what has one more."""
    return value if value is None or value.dim() == axes else value[first : first + count]
