"""Causal depthwise convolution with SiLU in Triton.

    pre[t]       = bias + sum_tap weight[tap] x[t - (width - 1) + tap]              out = silu(pre)
    dpre         = dout silu'(pre)
    dx[t]        = sum_tap weight[tap] dpre[t + (width - 1) - tap]
    dweight[tap] = sum over batch, t of dpre[t] x[t - (width - 1) + tap]            dbias = sum over batch, t of dpre[t]

With REVERSE every shift in time changes its sign: tap and width - 1 - tap change places, before and after change
places, and nothing else happens.

A *run* is RUN = 8 consecutive steps of one channel, held by one thread as a tuple of 8 tensors over the program's
(BLOCK_DIM, BLOCK_RUNS) channels and runs. A shift in time is then another index into the tuple and costs nothing. The
neighbouring steps that the filter reaches, a run's *context*, are read too; another thread of the program reads them as
its own, so they come from the cache. The two memory layouts differ in how a run is read and written, nowhere else:

* time contiguous, (batch, dim, length): 8 steps of bfloat16 are one 16-byte vector, taken apart in registers;
* channels contiguous, (batch, length, dim): 8 rows, along each of which neighbouring threads own neighbouring channels.

Forward: a program owns BLOCK_DIM channels and BLOCK_RUNS runs of one sequence. It reads its runs of ``x`` and the
context before them, and writes its runs of ``out``.

Backward: a program owns BLOCK_DIM channels and ``blocks`` x BLOCK_RUNS runs of one sequence. It reads ``x`` with
context on both sides and ``dout`` with the context after, recomputes ``pre``, and writes its runs of ``dx`` and one
row of ``partial``, (programs, width + 1, dim) in float32: its share of dweight and dbias. A second kernel adds the rows
in a fixed order, so two runs give the same bits. Only the inputs are kept between the two passes.

Sizes and strides are run-time values. What divides them, up to a run, is a constant (ALIGN), without which no load
would be a vector; so a new length compiles nothing, unless it is the first odd one, say, or the first short one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cab_kernels._backend import interpreting
from cab_kernels.conv.device_kernels import (
    RUN,
    convolve,
    filter_gradients,
    initial_column,
    load_around,
    load_dout,
    load_filter,
    load_seq_idx,
    load_x,
    multiple,
    position,
    pre_gradients,
    sigmoid,
    store_filter,
    store_run,
    within,
    x_gradient,
)

# The context must fit into one neighbouring run.
MAX_WIDTH = RUN.value + 1


@triton.jit(
    do_not_specialize=[
        "dim", "length", "groups", "stride_x_batch", "stride_x_row", "stride_out_batch", "stride_out_row",
    ]
)  # fmt: skip
def _causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_idx_ptr, out_ptr,
    dim, length, groups, stride_x_batch, stride_x_row, stride_out_batch, stride_out_row,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr,
    TIME_FAST: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = position(dim, groups, BLOCK_DIM)
    dim, length = multiple(dim, 1 if TIME_FAST else ALIGN), multiple(length, ALIGN if TIME_FAST else 1)
    stride_x_row = multiple(stride_x_row, ALIGN).to(tl.int64)
    stride_out_row = multiple(stride_out_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * multiple(stride_x_batch, ALIGN)
    out_ptr += pid_batch * multiple(stride_out_batch, ALIGN)
    if HAS_INITIAL:
        initial_ptr += pid_batch * dim * (WIDTH - 1)
    weight, bias = load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH, HAS_BIAS)
    start = (pid_time * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN

    own = load_x(x_ptr, initial_ptr, stride_x_row, start, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST)
    near = load_x(
        x_ptr, initial_ptr, stride_x_row, start + RUN if REVERSE else start - RUN, offs_dim, dim, length,
        WIDTH, REVERSE, HAS_INITIAL, TIME_FAST,
    )  # fmt: skip
    x = own + near[: WIDTH - 1] if REVERSE else near[RUN - (WIDTH - 1) :] + own
    seq = ()
    if HAS_SEQ_IDX:
        seq = load_seq_idx(seq_idx_ptr + pid_batch * length, start, length)
        seq = seq[RUN : 2 * RUN + WIDTH - 1] if REVERSE else seq[RUN - (WIDTH - 1) : 2 * RUN]

    out = ()
    for i in tl.static_range(RUN):
        value = convolve(x, seq, weight, bias, i, WIDTH, REVERSE, HAS_SEQ_IDX)
        if SILU:
            value = value * sigmoid(value, NATIVE)
        if HAS_SEQ_IDX:
            value = tl.where(seq[i + (0 if REVERSE else WIDTH - 1)] >= 0, value, 0.0)
        out = out + (value,)
    store_run(out_ptr, out, stride_out_row, start, offs_dim, dim, length, TIME_FAST)


@triton.jit(
    do_not_specialize=[
        "dim", "length", "groups", "blocks", "stride_x_batch", "stride_x_row", "stride_dout_batch", "stride_dout_row",
        "stride_dx_batch", "stride_dx_row",
    ]
)  # fmt: skip
def _causal_conv1d_bwd_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, seq_idx_ptr, dout_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    dim, length, groups, blocks,
    stride_x_batch, stride_x_row, stride_dout_batch, stride_dout_row, stride_dx_batch, stride_dx_row,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ_IDX: tl.constexpr,
    SILU: tl.constexpr, REVERSE: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DWEIGHT: tl.constexpr,
    TIME_FAST: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = position(dim, groups, BLOCK_DIM)
    partial_ptr += (pid_batch * groups + pid_time) * (WIDTH + 1) * dim
    dim, length = multiple(dim, 1 if TIME_FAST else ALIGN), multiple(length, ALIGN if TIME_FAST else 1)
    stride_x_row = multiple(stride_x_row, ALIGN).to(tl.int64)
    stride_dout_row = multiple(stride_dout_row, ALIGN).to(tl.int64)
    stride_dx_row = multiple(stride_dx_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * multiple(stride_x_batch, ALIGN)
    dout_ptr += pid_batch * multiple(stride_dout_batch, ALIGN)
    dx_ptr += pid_batch * multiple(stride_dx_batch, ALIGN)
    if HAS_INITIAL:
        initial_ptr += pid_batch * dim * (WIDTH - 1)
        dinitial_ptr += pid_batch * dim * (WIDTH - 1)
    weight, bias = load_filter(weight_ptr, bias_ptr, offs_dim, dim, WIDTH, HAS_BIAS)
    dfilter = ()
    for _ in tl.static_range(WIDTH + 1):
        dfilter = dfilter + (tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32),)

    # The initial states are the last steps of the run before the first one.
    origin = -RUN if HAS_INITIAL and not REVERSE else 0
    for block in range(pid_time * blocks, (pid_time + 1) * blocks):
        start = origin + (block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN
        x = load_around(
            x_ptr, initial_ptr, stride_x_row, start, offs_dim, dim, length, WIDTH, REVERSE, HAS_INITIAL, TIME_FAST
        )
        seq = ()
        if HAS_SEQ_IDX:
            seq = load_seq_idx(seq_idx_ptr + pid_batch * length, start, length)
            seq = seq[RUN - (WIDTH - 1) : 2 * RUN + WIDTH - 1]
        dout = load_dout(dout_ptr, stride_dout_row, start, offs_dim, dim, length, WIDTH, REVERSE, TIME_FAST)
        dpre = pre_gradients(dout, x, seq, weight, bias, WIDTH, REVERSE, HAS_SEQ_IDX, SILU, NATIVE)
        if NEEDS_DX:
            dx = ()
            for i in tl.static_range(RUN):
                nothing = tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32)
                dx = dx + (x_gradient(nothing, dpre, seq, weight, i, WIDTH, REVERSE, HAS_SEQ_IDX),)
            store_run(dx_ptr, dx, stride_dx_row, start, offs_dim, dim, length, TIME_FAST)
            if HAS_INITIAL:
                for i in tl.static_range(RUN):
                    column = initial_column(start + i, length, WIDTH, REVERSE)
                    inside = (offs_dim < dim) & within(column, WIDTH - 1)
                    offset = offs_dim.to(tl.int64) * (WIDTH - 1) + column
                    tl.store(dinitial_ptr + offset, dx[i].to(dinitial_ptr.dtype.element_ty), mask=inside)
        if NEEDS_DWEIGHT:
            dfilter = filter_gradients(dfilter, dpre, x, seq, WIDTH, REVERSE, HAS_SEQ_IDX)

    if NEEDS_DWEIGHT:
        store_filter(partial_ptr, dfilter, offs_dim, dim, WIDTH)


@triton.jit(do_not_specialize=["programs", "dim"])
def _causal_conv1d_reduce_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, programs, dim,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Add the rows of ``partial``; a program owns one tap, or the bias, of BLOCK_DIM channels."""
    tap = tl.program_id(0) % (WIDTH + 1)
    offs_dim = (tl.program_id(0) // (WIDTH + 1)) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_DIM], tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        row = first + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        offset = (row.to(tl.int64) * (WIDTH + 1) + tap) * dim + offs_dim[None, :]
        total += tl.load(partial_ptr + offset, mask=(row < programs) & (offs_dim < dim)[None, :], other=0.0)
    grad = tl.sum(total, axis=0)
    tl.store(
        dweight_ptr + offs_dim.to(tl.int64) * WIDTH + tap,
        grad.to(dweight_ptr.dtype.element_ty),
        mask=(offs_dim < dim) & (tap < WIDTH),
    )
    if HAS_BIAS:
        tl.store(dbias_ptr + offs_dim, grad.to(dbias_ptr.dtype.element_ty), mask=(offs_dim < dim) & (tap == WIDTH))


class Tiling(NamedTuple):
    """How the programs of a launch divide the work."""

    block_dim: int
    block_runs: int
    blocks: int  # of runs that a program of the backward pass takes one after another
    num_warps: int = 4


# The choices for short rows, long rows, and channels contiguous. Milliseconds forward / backward on an H100, bfloat16,
# width 4, SiLU, Triton 3.6, beside those of the other tilings tried:
#   128 x 384 x 197     short    8 x 32: 0.035 / 0.080     32 x 4: 0.039 / 0.122      32 x 1: 0.045 / 0.100
#   8 x 1536 x 2048     long     2 x 64: 0.040 / 0.067     4 x 32: 0.040 / 0.071      8 x 16: 0.043 / 0.106
#   8 x 1536 x 2048  channels   64 x 4: 0.044 / 0.082    128 x 4: 0.039 forward     128 x 2: 0.039 / 0.088
_SHORT = Tiling(8, 32, 1)
_LONG = Tiling(2, 64, 4)
_CHANNELS_FWD = Tiling(128, 4, 1)
_CHANNELS_BWD = Tiling(64, 4, 8)


def _tiling(time_fast: bool, length: int, backward: bool) -> Tiling:
    if time_fast:
        return _SHORT if length <= _SHORT.block_runs * RUN.value else _LONG
    return _CHANNELS_BWD if backward else _CHANNELS_FWD


def _readable(x: Tensor) -> tuple[Tensor, bool]:
    """``x``, or a copy, with time or channels contiguous, and whether it is time."""
    time_fast = x.stride(1) != 1 or (x.shape[1] == 1 and x.stride(2) == 1)
    return _with_contiguous(x, time_fast), time_fast


def _with_contiguous(tensor: Tensor, time_fast: bool) -> Tensor:
    """The tensor itself if time, or else channels, are contiguous in it as asked; if not, a copy."""
    fast = 2 if time_fast else 1
    if tensor.stride(fast) == 1 or tensor.shape[fast] == 1:
        return tensor
    return tensor.contiguous() if time_fast else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def alignment(slow: int, *tensors: Tensor) -> int:
    """The most elements, up to a run, that divide the contiguous axis and the place of every row of every tensor."""
    places = [tensors[0].shape[3 - slow]]
    for tensor in tensors:
        places += [tensor.stride(axis) for axis in (0, slow) if tensor.shape[axis] > 1]
        places.append(tensor.data_ptr() // tensor.element_size())
    return math.gcd(RUN.value, *places)


def native(tensor: Tensor) -> bool:
    """Whether kernels on ``tensor`` may use the instructions of NVIDIA GPUs."""
    return tensor.is_cuda and torch.version.hip is None and not interpreting()


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    """Launch the forward kernel: ``out`` is dense, with the same axis contiguous as ``x``."""
    x, time_fast = _readable(x)
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    batch, dim, length = x.shape
    slow = 1 if time_fast else 2
    tiling = _tiling(time_fast, length, backward=False)
    groups = triton.cdiv(length, RUN.value * tiling.block_runs)
    with torch.cuda.device_of(x):
        _causal_conv1d_fwd_kernel[(triton.cdiv(dim, tiling.block_dim) * batch * groups,)](
            x_ptr=x,
            weight_ptr=weight.contiguous(),
            bias_ptr=_contiguous(bias),
            initial_ptr=_contiguous(initial_states),
            seq_idx_ptr=_contiguous(seq_idx),
            out_ptr=out,
            dim=dim,
            length=length,
            groups=groups,
            stride_x_batch=x.stride(0),
            stride_x_row=x.stride(slow),
            stride_out_batch=out.stride(0),
            stride_out_row=out.stride(slow),
            WIDTH=weight.shape[1],
            HAS_BIAS=bias is not None,
            HAS_INITIAL=initial_states is not None,
            HAS_SEQ_IDX=seq_idx is not None,
            SILU=silu,
            REVERSE=reverse,
            TIME_FAST=time_fast,
            ALIGN=alignment(slow, x, out),
            NATIVE=native(x),
            BLOCK_DIM=tiling.block_dim,
            BLOCK_RUNS=tiling.block_runs,
            num_warps=tiling.num_warps,
            enable_fp_fusion=True,
        )
    return out


def causal_conv1d_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    needs_dx: bool,
    needs_dweight: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernels: dx, dweight, dbias, dinitial_states, of no elements where one is not needed.

    ``needs_dx`` stands for ``x`` and ``initial_states``, ``needs_dweight`` for ``weight`` and ``bias``: the kernel
    computes each pair together. A ``dx`` that is given, with the same axis contiguous as ``x``, is written.
    """
    x, time_fast = _readable(x)
    dout = _with_contiguous(dout, time_fast)
    dx, dweight, dbias, dinitial = _empty_gradients(x, weight, bias, initial_states, needs_dx, needs_dweight, dx)
    batch, dim, length = x.shape
    width = weight.shape[1]
    slow = 1 if time_fast else 2
    tiling = _tiling(time_fast, length, backward=True)
    # Where there are initial states, the run that holds them is swept too.
    runs = triton.cdiv(length + (RUN.value if initial_states is not None else 0), RUN.value)
    blocks = max(1, min(tiling.blocks, triton.cdiv(runs, tiling.block_runs)))
    groups = triton.cdiv(runs, blocks * tiling.block_runs)
    programs = batch * groups
    partial = x.new_empty(programs if needs_dweight else 0, width + 1, dim, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if programs * dim > 0:
            _causal_conv1d_bwd_kernel[(triton.cdiv(dim, tiling.block_dim) * programs,)](
                x_ptr=x,
                weight_ptr=weight.contiguous(),
                bias_ptr=_contiguous(bias),
                initial_ptr=_contiguous(initial_states),
                seq_idx_ptr=_contiguous(seq_idx),
                dout_ptr=dout,
                dx_ptr=dx,
                dinitial_ptr=dinitial,
                partial_ptr=partial,
                dim=dim,
                length=length,
                groups=groups,
                blocks=blocks,
                stride_x_batch=x.stride(0),
                stride_x_row=x.stride(slow),
                stride_dout_batch=dout.stride(0),
                stride_dout_row=dout.stride(slow),
                stride_dx_batch=dx.stride(0) if needs_dx else 0,
                stride_dx_row=dx.stride(slow) if needs_dx else 0,
                WIDTH=width,
                HAS_BIAS=bias is not None,
                HAS_INITIAL=initial_states is not None,
                HAS_SEQ_IDX=seq_idx is not None,
                SILU=silu,
                REVERSE=reverse,
                NEEDS_DX=needs_dx,
                NEEDS_DWEIGHT=needs_dweight,
                TIME_FAST=time_fast,
                ALIGN=alignment(slow, x, dout, dx) if needs_dx else alignment(slow, x, dout),
                NATIVE=native(x),
                BLOCK_DIM=tiling.block_dim,
                BLOCK_RUNS=tiling.block_runs,
                num_warps=tiling.num_warps,
                enable_fp_fusion=True,
            )
        if needs_dweight:
            reduce_partials(partial, dweight, dbias)
    return dx, dweight, dbias, dinitial


def reduce_partials(partial: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    """Add up what the programs, (programs, width + 1, dim), gave dweight and dbias, of no elements if not needed."""
    programs, taps, dim = partial.shape
    if dim > 0:
        _causal_conv1d_reduce_kernel[(taps * triton.cdiv(dim, 32),)](
            partial_ptr=partial,
            dweight_ptr=dweight,
            dbias_ptr=dbias,
            programs=programs,
            dim=dim,
            WIDTH=taps - 1,
            HAS_BIAS=dbias.numel() > 0,
            BLOCK_PROGRAMS=64,
            BLOCK_DIM=32,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _empty_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    needs_dx: bool,
    needs_dweight: bool,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients that are needed; ``dx`` may be there already."""
    if dx is None:
        dx = torch.empty_like(_readable(x)[0]) if needs_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0)
    dbias = x.new_empty(0) if bias is None or not needs_dweight else bias.new_empty(bias.shape)
    dinitial = (
        x.new_empty(0) if initial_states is None or not needs_dx else initial_states.new_empty(initial_states.shape)
    )
    return dx, dweight, dbias, dinitial


@torch.library.custom_op("cab_kernels::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> Tensor:
    return causal_conv1d_fwd(x, weight, bias, initial_states, seq_idx, silu, reverse)


@causal_conv1d.register_fake
def _(x, weight, bias, initial_states, seq_idx, silu, reverse):
    return torch.empty_like(_readable(x)[0])


@torch.library.custom_op("cab_kernels::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return causal_conv1d_bwd(dout, x, weight, bias, initial_states, seq_idx, silu, reverse, needs_dx, needs_dweight)


@causal_conv1d_backward.register_fake
def _(dout, x, weight, bias, initial_states, seq_idx, silu, reverse, needs_dx, needs_dweight):
    return _empty_gradients(x, weight, bias, initial_states, needs_dx, needs_dweight)


class CausalConv1d(torch.autograd.Function):
    """``causal_conv1d`` with its gradient."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.silu, ctx.reverse = arguments
        ctx.save_for_backward(*tensors)
        return causal_conv1d(*arguments)

    @staticmethod
    def backward(ctx, dout):
        needs_x, needs_weight, needs_bias, needs_initial, *_ = ctx.needs_input_grad
        dx, dweight, dbias, dinitial = causal_conv1d_backward(
            dout, *ctx.saved_tensors, ctx.silu, ctx.reverse, needs_x or needs_initial, needs_weight or needs_bias
        )
        return (
            dx if needs_x else None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            dinitial if needs_initial else None,
            None,
            None,
            None,
        )
