"""Vision Mamba's two convolutions of one ``x``, of either direction, in the launches of one.

Formulas, runs and tiles are those of ``kernels.py``, with channels contiguous. Forward: a program reads its runs of
``x`` and their context on both sides once, and writes its runs of both results. Backward: it reads the same, its runs
of both ``dout`` with the context that each wants, and writes its runs of ``dx``, the sum of both directions', and for
each direction its row of ``partial``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cab_kernels.conv.device_kernels import (
    RUN,
    convolve,
    filter_gradients,
    load_around,
    load_dout,
    load_filter,
    multiple,
    position,
    pre_gradients,
    sigmoid,
    store_filter,
    store_run,
    x_gradient,
)
from cab_kernels.conv.kernels import Tiling, alignment, native, reduce_partials

Pair = Sequence[Tensor]

# By registers, not by time: 95 and 128 a thread on a Hopper GPU, which leave it as many warps as one direction has.
# With the tiles of one direction backward takes 138.
FORWARD = Tiling(128, 4, 1)
BACKWARD = Tiling(128, 2, 8)


@triton.jit(do_not_specialize=["dim", "length", "groups", "stride_x_batch", "stride_x_row", "stride_out_way"])
def _bidirectional_conv1d_fwd_kernel(
    x_ptr, weights, biases, out_ptr, dim, length, groups, stride_x_batch, stride_x_row, stride_out_way,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = position(dim, groups, BLOCK_DIM)
    dim = multiple(dim, ALIGN)
    stride_x_row = multiple(stride_x_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * multiple(stride_x_batch, ALIGN)
    out_ptr += pid_batch * length * dim
    start = (pid_time * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN
    x = load_around(x_ptr, None, stride_x_row, start, offs_dim, dim, length, WIDTH, False, False, False)
    for way in tl.static_range(2):
        weight, bias = load_filter(weights[way], biases[way], offs_dim, dim, WIDTH, True)
        out = ()
        for i in tl.static_range(RUN):
            value = convolve(x, (), weight, bias, i + (WIDTH - 1 if way else 0), WIDTH, way == 1, False)
            out = out + (value * sigmoid(value, NATIVE),)
        out_ptr_way = out_ptr + way * multiple(stride_out_way, ALIGN).to(tl.int64)
        store_run(out_ptr_way, out, dim.to(tl.int64), start, offs_dim, dim, length, False)


@triton.jit(
    do_not_specialize=[
        "dim", "length", "groups", "blocks", "stride_x_batch", "stride_x_row", "stride_dx_batch", "stride_dx_row",
    ]
)  # fmt: skip
def _bidirectional_conv1d_bwd_kernel(
    x_ptr, weights, biases, douts, dx_ptr, partials,
    dim, length, groups, blocks, stride_x_batch, stride_x_row, stride_dx_batch, stride_dx_row,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, NATIVE: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    pid_batch, offs_dim, pid_time = position(dim, groups, BLOCK_DIM)
    partial = (pid_batch * groups + pid_time) * (WIDTH + 1) * dim
    dim = multiple(dim, ALIGN)
    stride_x_row = multiple(stride_x_row, ALIGN).to(tl.int64)
    stride_dx_row = multiple(stride_dx_row, ALIGN).to(tl.int64)
    x_ptr += pid_batch * multiple(stride_x_batch, ALIGN)
    dx_ptr += pid_batch * multiple(stride_dx_batch, ALIGN)
    row = dim.to(tl.int64)
    dout0_ptr, dout1_ptr = douts[0] + pid_batch * length * row, douts[1] + pid_batch * length * row
    weight0, bias0 = load_filter(weights[0], biases[0], offs_dim, dim, WIDTH, True)
    weight1, bias1 = load_filter(weights[1], biases[1], offs_dim, dim, WIDTH, True)
    dfilter0, dfilter1 = (), ()
    for _ in tl.static_range(WIDTH + 1):
        dfilter0 = dfilter0 + (tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32),)
        dfilter1 = dfilter1 + (tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32),)

    for block in range(pid_time * blocks, (pid_time + 1) * blocks):
        start = (block * BLOCK_RUNS + tl.arange(0, BLOCK_RUNS)[None, :]) * RUN
        x = load_around(x_ptr, None, stride_x_row, start, offs_dim, dim, length, WIDTH, False, False, False)
        dout = load_dout(dout0_ptr, row, start, offs_dim, dim, length, WIDTH, False, False)
        dpre = pre_gradients(dout, x, (), weight0, bias0, WIDTH, False, False, True, NATIVE)
        dfilter0 = filter_gradients(dfilter0, dpre, x, (), WIDTH, False, False)
        dx = ()
        for i in tl.static_range(RUN):
            nothing = tl.zeros([BLOCK_DIM, BLOCK_RUNS], tl.float32)
            dx = dx + (x_gradient(nothing, dpre, (), weight0, i, WIDTH, False, False),)
        dout = load_dout(dout1_ptr, row, start, offs_dim, dim, length, WIDTH, True, False)
        dpre = pre_gradients(dout, x, (), weight1, bias1, WIDTH, True, False, True, NATIVE)
        dfilter1 = filter_gradients(dfilter1, dpre, x, (), WIDTH, True, False)
        total = ()
        for i in tl.static_range(RUN):
            total = total + (x_gradient(dx[i], dpre, (), weight1, i, WIDTH, True, False),)
        store_run(dx_ptr, total, stride_dx_row, start, offs_dim, dim, length, False)
    store_filter(partials[0] + partial, dfilter0, offs_dim, dim, WIDTH)
    store_filter(partials[1] + partial, dfilter1, offs_dim, dim, WIDTH)


def bidirectional_conv1d_fwd(x: Tensor, weights: Pair, biases: Pair) -> Tensor:
    """Of x (batch, dim, length), channels contiguous, the results of either direction: (2, batch, length, dim)."""
    batch, dim, length = x.shape
    out = x.new_empty(2, batch, length, dim)
    groups = triton.cdiv(length, RUN.value * FORWARD.block_runs)
    if out.numel() > 0:
        with torch.cuda.device_of(x):
            _bidirectional_conv1d_fwd_kernel[(triton.cdiv(dim, FORWARD.block_dim) * batch * groups,)](
                x_ptr=x,
                weights=tuple(weight.contiguous() for weight in weights),
                biases=tuple(bias.contiguous() for bias in biases),
                out_ptr=out,
                dim=dim,
                length=length,
                groups=groups,
                stride_x_batch=x.stride(0),
                stride_x_row=x.stride(2),
                stride_out_way=out.stride(0),
                WIDTH=weights[0].shape[1],
                ALIGN=alignment(2, x, out[0].mT, out[1].mT),
                NATIVE=native(x),
                BLOCK_DIM=FORWARD.block_dim,
                BLOCK_RUNS=FORWARD.block_runs,
                num_warps=FORWARD.num_warps,
                enable_fp_fusion=True,
            )
    return out


def bidirectional_conv1d_bwd(
    douts: Pair, x: Tensor, weights: Pair, biases: Pair, dx: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Write dx, (batch, dim, length) with channels contiguous as in x, and return both dweight and both dbias.

    ``douts`` are (batch, dim, length), dense with channels contiguous.
    """
    batch, dim, length = x.shape
    width = weights[0].shape[1]
    tiles = triton.cdiv(length, RUN.value * BACKWARD.block_runs)
    groups = triton.cdiv(tiles, BACKWARD.blocks)
    blocks = triton.cdiv(tiles, max(1, groups))
    partials = x.new_empty(2, batch * groups, width + 1, dim, dtype=torch.float32)
    dweights, dbiases = ([given.new_empty(given.shape) for given in pair] for pair in (weights, biases))
    with torch.cuda.device_of(x):
        if partials.numel() > 0:
            _bidirectional_conv1d_bwd_kernel[(triton.cdiv(dim, BACKWARD.block_dim) * batch * groups,)](
                x_ptr=x,
                weights=tuple(weight.contiguous() for weight in weights),
                biases=tuple(bias.contiguous() for bias in biases),
                douts=tuple(douts),
                dx_ptr=dx,
                partials=tuple(partials.unbind()),
                dim=dim,
                length=length,
                groups=groups,
                blocks=blocks,
                stride_x_batch=x.stride(0),
                stride_x_row=x.stride(2),
                stride_dx_batch=dx.stride(0),
                stride_dx_row=dx.stride(2),
                WIDTH=width,
                ALIGN=alignment(2, x, dx, *douts),
                NATIVE=native(x),
                BLOCK_DIM=BACKWARD.block_dim,
                BLOCK_RUNS=BACKWARD.block_runs,
                num_warps=BACKWARD.num_warps,
                enable_fp_fusion=True,
            )
        for partial, dweight, dbias in zip(partials, dweights, dbiases, strict=True):
            reduce_partials(partial, dweight, dbias)
    return dweights, dbiases
