"""A bidirectional Mamba block between its projections, on the kernels: one op for each pass.

    u = silu(conv(x))     dt | B | C = x_proj u     delta = dt_proj dt     out = scan(u, delta, -exp(A_log), B, C, D, z)

Both directions lie side by side, (2, batch, length, ...), so that a product serves both. Kept for backward: xz, the
projections dt | B | C, the scan's states and the weights as the products take them. Made again: u and delta. Gradients
are written where they are wanted: those of x and z as the halves of one tensor, those of dt, B and C as parts of one,
and what the projections add to that of u is added by the product that computes it.

The parts of a row of projections begin at multiples of 16 bytes, as fast products and vector loads want them: dt has
columns of zeros behind its own, *padded* in all. One kernel lays the weights out so, casts them, and makes A of A_log;
another one does the opposite to their gradients. A program of these owns BLOCK numbers of each of three tensors. A
third one adds what others, the bridges, give B and C as gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cab_kernels.conv.bidirectional_kernels import bidirectional_conv1d_bwd, bidirectional_conv1d_fwd
from cab_kernels.scan.launch_backward_kernels import new_gradients, selective_scan_bwd
from cab_kernels.scan.launch_forward_kernels import new_results, selective_scan_fwd
from cab_kernels.scan.launch_kernels import span_for

Pair = Sequence[Tensor]

BLOCK = 256
BLOCK_ROWS = 64


@triton.jit
def _weights_kernel(
    x_proj, dt_proj, A_log, x_weight_ptr, dt_weight_ptr, A_ptr, rank, padded, dstate, dim, BLOCK: tl.constexpr
):
    """x_proj with rows and dt_proj with columns of zeros up to ``padded``, and A; see the module."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offs // dim
    columns = padded + 2 * dstate
    own_row = (row < rank) | ((row >= padded) & (row < columns))
    given = tl.where(row < padded, offs, offs - (padded - rank) * dim)
    channel, column = offs // padded, offs % padded
    for way in tl.static_range(2):
        value = tl.load(x_proj[way] + given, mask=own_row, other=0.0)
        tl.store(x_weight_ptr + way * columns * dim + offs, value.to(x_weight_ptr.dtype.element_ty), mask=row < columns)
        inside = (channel < dim) & (column < rank)
        value = tl.load(dt_proj[way] + channel * rank + column, mask=inside, other=0.0)
        tl.store(
            dt_weight_ptr + way * dim * padded + offs, value.to(dt_weight_ptr.dtype.element_ty), mask=channel < dim
        )
        value = tl.load(A_log[way] + offs, mask=offs < dim * dstate, other=0.0).to(tl.float32)
        tl.store(A_ptr + way * dim * dstate + offs, -tl.exp(value), mask=offs < dim * dstate)


@triton.jit
def _weights_grad_kernel(
    dx_weight_ptr, ddt_weight_ptr, dA_ptr, A_ptr, dx_proj, ddt_proj, dA_log, rank, padded, dstate, dim,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of x_proj, dt_proj and A_log; see the module."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = offs // dim
    columns = padded + 2 * dstate
    own_row = row < rank + 2 * dstate
    found = tl.where(row < rank, offs, offs + (padded - rank) * dim)
    channel, column = offs // rank, offs % rank
    for way in tl.static_range(2):
        value = tl.load(dx_weight_ptr + way * columns * dim + found, mask=own_row, other=0.0)
        tl.store(dx_proj[way] + offs, value.to(dx_proj[way].dtype.element_ty), mask=own_row)
        inside = channel < dim
        value = tl.load(ddt_weight_ptr + (way * dim + channel) * padded + column, mask=inside, other=0.0)
        tl.store(ddt_proj[way] + offs, value.to(ddt_proj[way].dtype.element_ty), mask=inside)
        inside = offs < dim * dstate
        place = way * dim * dstate + offs
        value = tl.load(dA_ptr + place, mask=inside, other=0.0) * tl.load(A_ptr + place, mask=inside, other=0.0)
        tl.store(dA_log[way] + offs, value.to(dA_log[way].dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_projections_kernel(
    out_ptr, given, rows, columns, padded, dstate, BLOCK_ROWS: tl.constexpr, BLOCK_STATE: tl.constexpr
):
    """Add what both B and both C are given, (rows, dstate) each, where they lie in BLOCK_ROWS rows of projections."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    state = tl.arange(0, BLOCK_STATE)[None, :]
    mask = (row < rows) & (state < dstate)
    for i in tl.static_range(4):
        place = out_ptr + ((i % 2) * tl.cast(rows, tl.int64) + row) * columns + padded + (i // 2) * dstate + state
        total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        total += tl.load(given[i] + row * dstate + state, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(out_ptr.dtype.element_ty), mask=mask)


def _new_weights(xz: Tensor, dt_proj: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for both directions' x_proj and dt_proj as the products take them, and A."""
    (dim, rank), dstate = dt_proj.shape, A_log.shape[1]
    numbers = 16 // xz.dtype.itemsize
    padded = triton.cdiv(rank, numbers) * numbers
    x_weight, dt_weight = xz.new_empty(2, padded + 2 * dstate, dim), xz.new_empty(2, dim, padded)
    return x_weight, dt_weight, xz.new_empty(2, dim, dstate, dtype=torch.float32)


def _lay_out(x_proj: Pair, dt_proj: Pair, A_log: Pair, x_weight: Tensor, dt_weight: Tensor, A: Tensor) -> None:
    dim, padded = dt_weight.shape[1:]
    with torch.cuda.device_of(A):
        _weights_kernel[(triton.cdiv(max(x_weight[0].numel(), dt_weight[0].numel()), BLOCK),)](
            *(tuple(one.contiguous() for one in pair) for pair in (x_proj, dt_proj, A_log)),
            x_weight,
            dt_weight,
            A,
            dt_proj[0].shape[1],
            padded,
            A.shape[2],
            dim,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _lay_back(
    dx_weight: Tensor, ddt_weight: Tensor, dA: Tensor, A: Tensor, dx_proj: Pair, ddt_proj: Pair, dA_log: Pair
) -> None:
    dim, padded = ddt_weight.shape[1:]
    with torch.cuda.device_of(A):
        _weights_grad_kernel[(triton.cdiv(max(dx_proj[0].numel(), ddt_proj[0].numel()), BLOCK),)](
            dx_weight,
            ddt_weight,
            dA,
            A,
            tuple(dx_proj),
            tuple(ddt_proj),
            tuple(dA_log),
            ddt_proj[0].shape[1],
            padded,
            A.shape[2],
            dim,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _add_projections(dprojected: Tensor, dt_weight: Tensor, dB: list[Tensor | None], dC: list[Tensor | None]) -> None:
    """Add to the gradients of B and C in ``dprojected`` those that are given; none counts as zero."""
    given = [*dB, *dC]
    if all(gradient is None for gradient in given):
        return
    _, batch, length, columns = dprojected.shape
    padded = dt_weight.shape[2]
    dstate = (columns - padded) // 2
    size = (batch, length, dstate)
    with torch.cuda.device_of(dprojected):
        _add_projections_kernel[(triton.cdiv(batch * length, BLOCK_ROWS),)](
            dprojected,
            tuple(dprojected.new_zeros(size) if gradient is None else gradient.contiguous() for gradient in given),
            batch * length,
            columns,
            padded,
            dstate,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_STATE=triton.next_power_of_2(dstate),
            num_warps=4,
            enable_fp_fusion=True,
        )


def _product(inputs: Tensor, weight: Tensor) -> Tensor:
    """(2, batch, length, inputs) times (2, outputs, inputs): (2, batch, length, outputs)."""
    return torch.bmm(inputs.flatten(1, 2), weight.mT).unflatten(1, inputs.shape[1:3])


def _parts(projected: Tensor, dt_weight: Tensor, A: Tensor) -> Sequence[Tensor]:
    """dt, B and C, of the last axis of their projections."""
    return projected.split([dt_weight.shape[2], A.shape[2], A.shape[2]], dim=-1)


def _pair(both: Tensor) -> list[Tensor]:
    """As the scan takes what lies side by side, (2, batch, length, channels)."""
    return list(both.mT.unbind())


def _scanned(
    u: Tensor, projected: Tensor, z: Tensor, dt_weight: Tensor, dt_bias: Pair, A: Tensor, D: Pair
) -> tuple[Any, ...]:
    """What is scanned: pairs of (batch, channels, length), and of parameters in float32."""
    dt, B, C = _parts(projected, dt_weight, A)
    us, deltas, Bs, Cs = map(_pair, (u, _product(dt, dt_weight), B, C))
    return us, deltas, list(A), Bs, Cs, [skip.float() for skip in D], z, [bias.float() for bias in dt_bias]


@torch.library.custom_op("cab_kernels::bidirectional_mamba_inner", mutates_args=())
def bidirectional_mamba_inner(
    xz: Tensor,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_proj: list[Tensor],
    dt_proj: list[Tensor],
    dt_bias: list[Tensor],
    A_log: list[Tensor],
    D: list[Tensor],
    keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, the projections of both directions, (2, batch, length, padded + 2 dstate), and what else backward wants.

    That is the scan's states, one in ``keep`` steps, x_proj and dt_proj as the products take them, and A.
    """
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.contiguous().mT.chunk(2, dim=1)
        x_weight, dt_weight, A = _new_weights(xz, dt_proj[0], A_log[0])
        _lay_out(x_proj, dt_proj, A_log, x_weight, dt_weight, A)
        u = bidirectional_conv1d_fwd(x, conv_weight, conv_bias)
        projected = _product(u, x_weight)
        scanned = _scanned(u, projected, z, dt_weight, dt_bias, A, D)
        out, _, states = selective_scan_fwd(*scanned, None, None, True, False, False, keep)
    return out.mT, projected, states, x_weight, dt_weight, A


@bidirectional_mamba_inner.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, keep):
    batch, length, channels = xz.shape
    x_weight, dt_weight, A = _new_weights(xz, dt_proj[0], A_log[0])
    out = xz.new_empty(batch, length, channels // 2)
    states = new_results([out.mT] * 2, list(A), None, False, keep)[2]
    return out, xz.new_empty(2, batch, length, x_weight.shape[1]), states, x_weight, dt_weight, A


def _alike(pair: Pair) -> list[Tensor]:
    """Room for both gradients of a pair."""
    return [tensor.new_empty(tensor.shape) for tensor in pair]


@torch.library.custom_op("cab_kernels::bidirectional_mamba_inner_backward", mutates_args=())
def bidirectional_mamba_inner_backward(
    dout: Tensor,
    dB_elsewhere: list[Tensor | None],
    dC_elsewhere: list[Tensor | None],
    xz: Tensor,
    conv_weight: list[Tensor],
    conv_bias: list[Tensor],
    x_proj: list[Tensor],
    dt_proj: list[Tensor],
    dt_bias: list[Tensor],
    A_log: list[Tensor],
    D: list[Tensor],
    projected: Tensor,
    states: Tensor,
    x_weight: Tensor,
    dt_weight: Tensor,
    A: Tensor,
) -> list[Tensor]:
    """The gradients of ``bidirectional_mamba_inner``, in the order of its tensors. It has none of its own.

    What is from elsewhere, others, who have seen B and C, give these. Of dt_bias and D both directions' are one tensor.
    """
    with torch.autocast(xz.device.type, enabled=False):
        xz = xz.contiguous()
        x, z = xz.mT.chunk(2, dim=1)
        u = bidirectional_conv1d_fwd(x, conv_weight, conv_bias)
        scanned = _scanned(u, projected, z, dt_weight, dt_bias, A, D)
        dxz, dprojected, dx_weight, ddt_weight, du, ddelta = map(
            torch.empty_like, (xz, projected, x_weight, dt_weight, u, u)
        )
        dx, dz = dxz.mT.chunk(2, dim=1)
        ddt, dB, dC = _parts(dprojected, dt_weight, A)
        dA, dD, ddt_bias = new_gradients((scanned[2], *scanned[5::2]), [True] * 3)
        found = [_pair(du), _pair(ddelta), dA, _pair(dB), _pair(dC), dD, dz, ddt_bias, None]
        selective_scan_bwd(dout.contiguous().mT, None, *scanned, None, None, states, True, False, found)
        _add_projections(dprojected, dt_weight, dB_elsewhere, dC_elsewhere)
        dt = _parts(projected, dt_weight, A)[0]
        torch.bmm(ddelta.flatten(1, 2), dt_weight, out=ddt.flatten(1, 2))
        for way in range(2):  # one by one: cuBLAS cuts a sum over all steps in pieces, unless it is one of a batch
            torch.mm(ddelta[way].flatten(0, 1).mT, dt[way].flatten(0, 1), out=ddt_weight[way])
            torch.mm(dprojected[way].flatten(0, 1).mT, u[way].flatten(0, 1), out=dx_weight[way])
        du.flatten(1, 2).baddbmm_(dprojected.flatten(1, 2), x_weight)
        dconv_weight, dconv_bias = bidirectional_conv1d_bwd(_pair(du), x, conv_weight, conv_bias, dx)
        dx_proj, ddt_proj, dA_log = _alike(x_proj), _alike(dt_proj), _alike(A_log)
        _lay_back(dx_weight, ddt_weight, dA, A, dx_proj, ddt_proj, dA_log)
    ddt_bias, dD = ddt_bias.to(dt_bias[0].dtype), dD.to(D[0].dtype)
    return [dxz, *dconv_weight, *dconv_bias, *dx_proj, *ddt_proj, ddt_bias, *dA_log, dD]


@bidirectional_mamba_inner_backward.register_fake
def _(dout, dB, dC, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, *kept):
    pairs = map(_alike, (conv_weight, conv_bias, x_proj, dt_proj))
    ddt_bias, dD = (pair[0].new_empty(2, *pair[0].shape) for pair in (dt_bias, D))
    return [xz.new_empty(xz.shape), *(one for pair in pairs for one in pair), ddt_bias, *_alike(A_log), dD]


class BidirectionalMambaInner(torch.autograd.Function):
    """``out``, both B and both C of ``bidirectional_mamba_inner``, with their gradient, by all inputs at once."""

    @staticmethod
    def forward(ctx, xz, *parameters):
        pairs = [list(pair) for pair in zip(parameters[::2], parameters[1::2], strict=True)]
        out, *kept = bidirectional_mamba_inner(xz, *pairs, span_for(xz.mT.chunk(2, dim=1)[0], pairs[5]))
        ctx.save_for_backward(xz, *parameters, *kept)
        ctx.set_materialize_grads(False)
        return out, *_projections(*kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dB0, dB1, dC0, dC1):
        xz, *rest = ctx.saved_tensors
        parameters, kept = rest[:14], rest[14:]
        pairs = [list(pair) for pair in zip(parameters[::2], parameters[1::2], strict=True)]
        if dout is None:
            dout = xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2)
        *gradients, ddt_bias, dA_log0, dA_log1, dD = bidirectional_mamba_inner_backward(
            dout, [dB0, dB1], [dC0, dC1], xz, *pairs, *kept
        )
        return *gradients, *ddt_bias.unbind(), dA_log0, dA_log1, *dD.unbind()


def _projections(projected, _states, _x_weight, dt_weight, A):
    """B of both directions, and C."""
    _, B, C = _parts(projected, dt_weight, A)
    return *B.unbind(), *C.unbind()


def bidirectional_mamba_inner_triton(xz: Tensor, *pairs: Pair) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """out, B and C of :func:`cab_kernels.bidirectional_mamba_inner_fn`."""
    parameters = [tensor for pair in pairs for tensor in pair]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (xz, *parameters)):
        out, *projections = BidirectionalMambaInner.apply(xz, *parameters)
    else:
        out, *kept = bidirectional_mamba_inner(xz, *map(list, pairs), 0)
        projections = _projections(*kept)
    return out, list(projections[:2]), list(projections[2:])
