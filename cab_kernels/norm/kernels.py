"""Residual add and root-mean-square norm in Triton.

    r    = x + residual              rstd = 1 / sqrt(mean(r^2) + eps)              y = r rstd weight + bias
    g    = dy weight                 dr   = rstd (g - r rstd mean(g r rstd)) + dresidual_out
    dx   = dresidual = dr            dweight = sum over rows of dy r rstd          dbias = sum over rows of dy

All axes but the last are one axis of rows. A *tile* is BLOCK_ROWS whole rows of BLOCK_WIDTH columns, the next power of
two from the width: 2048 numbers, or one row where that is longer. Memory bounds both passes: each tensor is read once
and written once, and between the two passes only r and rstd, (rows,) in float32, are kept.

Forward: a program owns one tile. It reads x and the residual and writes r, y and rstd. Where there is no residual and
r would be x bit by bit, r is not written, and x is kept for backward in its place.

Backward: at most PROGRAMS programs; each owns every PROGRAMS-th tile, of which it reads dy, r, rstd and dresidual_out
and writes dx and dresidual (only one of them where their dtypes are the same: they are the same numbers), and one row
of the partial sums of dweight and dbias, (programs, width) in float32. A second kernel adds the rows in a fixed order,
and PROGRAMS is a constant: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_WIDTH = 8192
TILE = 2048
PROGRAMS = 512  # at once on 132 multiprocessors, four on each


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, rstd_ptr,
    rows, width, eps, stride_x_row, stride_residual_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One tile of r, y and rstd; see the module."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    mask = (row < rows) & (column < width)
    r = tl.load(x_ptr + row * stride_x_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        r += tl.load(residual_ptr + row * stride_residual_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual_out_ptr is not None:
        rounded = r.to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row * width + column, rounded, mask=mask)
        r = rounded.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(r * r, axis=1, keep_dims=True) / width + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    y = r * rstd * tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "steps"])
def _rms_norm_bwd_kernel(
    dy_ptr, dresidual_out_ptr, r_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    rows, width, steps, stride_dy_row, stride_dresidual_out_row, stride_r_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Every PROGRAMS-th tile of dx and dresidual, and a row of the partial sums; see the module."""
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for step in range(0, steps):
        tile = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0)
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        # Read along one axis: with both, a thread would load it again for each of its numbers.
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        row = row[:, None]
        mask = (row < rows) & (column < width)
        dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(r_ptr + row * stride_r_row + column, mask=mask, other=0.0).to(tl.float32) * rstd
        dweight += dy * normed
        dbias += dy
        if dx_ptr is not None or dresidual_ptr is not None:
            g = dy * weight
            dr = rstd * (g - normed * (tl.sum(g * normed, axis=1, keep_dims=True) / width))
            if dresidual_out_ptr is not None:
                offset = row * stride_dresidual_out_row + column
                dr += tl.load(dresidual_out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            if dx_ptr is not None:
                tl.store(dx_ptr + row * width + column, dr.to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row * width + column, dr.to(dresidual_ptr.dtype.element_ty), mask=mask)
    partial = tl.program_id(0).to(tl.int64) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + partial, tl.sum(dweight, axis=0, keep_dims=True), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + partial, tl.sum(dbias, axis=0, keep_dims=True), mask=column < width)


@triton.jit
def _sum_rows(partial_ptr, column, programs, width, BLOCK_PROGRAMS: tl.constexpr):
    total = tl.zeros([BLOCK_PROGRAMS, column.shape[0]], tl.float32)
    for first in range(0, programs, BLOCK_PROGRAMS):
        row = first + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        offset = row.to(tl.int64) * width + column[None, :]
        total += tl.load(partial_ptr + offset, mask=(row < programs) & (column < width)[None, :], other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["programs", "width"])
def _rms_norm_reduce_kernel(
    partial_weight_ptr, partial_bias_ptr, dweight_ptr, dbias_ptr, programs, width,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the rows of the partial sums; a program owns BLOCK_WIDTH columns."""
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    if dweight_ptr is not None:
        dweight = _sum_rows(partial_weight_ptr, column, programs, width, BLOCK_PROGRAMS)
        tl.store(dweight_ptr + column, dweight.to(dweight_ptr.dtype.element_ty), mask=column < width)
    if dbias_ptr is not None:
        dbias = _sum_rows(partial_bias_ptr, column, programs, width, BLOCK_PROGRAMS)
        tl.store(dbias_ptr + column, dbias.to(dbias_ptr.dtype.element_ty), mask=column < width)


def row_tiling(width: int) -> dict[str, int]:
    """The tile for rows of ``width``; a thread holds 16 of its numbers."""
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, TILE // block_width)
    return {"BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width, "num_warps": block_rows * block_width // (16 * 32)}


def _rows(tensor: Tensor) -> Tensor:
    """(rows, width) with contiguous rows: a view where the tensor allows it."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _is_x(x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype) -> bool:
    """Whether r is x bit by bit."""
    return residual is None and residual_dtype == x.dtype


def _empty_outputs(
    x: Tensor, residual: Tensor | None, y_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=y_dtype),
        x.new_empty(0 if _is_x(x, residual, residual_dtype) else x.shape, dtype=residual_dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def rms_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: y, r (of no elements where it is x) and rstd, all contiguous."""
    y, residual_out, rstd = _empty_outputs(x, residual, y_dtype, residual_dtype)
    x_rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    rows, width = x_rows.shape
    tiling = row_tiling(width)
    with torch.cuda.device_of(x):
        _rms_norm_fwd_kernel[(triton.cdiv(rows, tiling["BLOCK_ROWS"]),)](
            x_ptr=x_rows,
            residual_ptr=residual_rows,
            weight_ptr=weight.contiguous(),
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            residual_out_ptr=None if _is_x(x, residual, residual_dtype) else residual_out,
            rstd_ptr=rstd,
            rows=rows,
            width=width,
            eps=eps,
            stride_x_row=x_rows.stride(0),
            stride_residual_row=0 if residual_rows is None else residual_rows.stride(0),
            enable_fp_fusion=True,
            **tiling,
        )
    return y, residual_out, rstd


def rms_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward kernel: dx, dresidual, dweight and dbias, of no elements where the dtype is None."""
    dx, dresidual = _empty_gradient(residual_out, dx_dtype), _empty_gradient(residual_out, dresidual_dtype)
    dweight, dbias = _empty_gradient(weight, dweight_dtype), _empty_gradient(weight, dbias_dtype)
    r, dy = _rows(residual_out), _rows(dy)
    dresidual_out = None if dresidual_out is None else _rows(dresidual_out)
    rows, width = r.shape
    tiling = row_tiling(width)
    tiles = triton.cdiv(rows, tiling["BLOCK_ROWS"])
    programs = max(1, min(PROGRAMS, tiles))  # without rows, one writes zeros
    partial_weight, partial_bias = (
        None if dtype is None else r.new_empty(programs, width, dtype=torch.float32)
        for dtype in (dweight_dtype, dbias_dtype)
    )
    with torch.cuda.device_of(r):
        _rms_norm_bwd_kernel[(programs,)](
            dy_ptr=dy,
            dresidual_out_ptr=dresidual_out,
            r_ptr=r,
            weight_ptr=weight.contiguous(),
            rstd_ptr=rstd,
            dx_ptr=None if dx_dtype is None else dx,
            dresidual_ptr=None if dresidual_dtype is None else dresidual,
            dweight_ptr=partial_weight,
            dbias_ptr=partial_bias,
            rows=rows,
            width=width,
            steps=triton.cdiv(tiles, programs),
            stride_dy_row=dy.stride(0),
            stride_dresidual_out_row=0 if dresidual_out is None else dresidual_out.stride(0),
            stride_r_row=r.stride(0),
            enable_fp_fusion=True,
            **tiling,
        )
        if dweight_dtype is not None or dbias_dtype is not None:
            _rms_norm_reduce_kernel[(triton.cdiv(width, 32),)](
                partial_weight_ptr=partial_weight,
                partial_bias_ptr=partial_bias,
                dweight_ptr=None if dweight_dtype is None else dweight,
                dbias_ptr=None if dbias_dtype is None else dbias,
                programs=programs,
                width=width,
                BLOCK_PROGRAMS=64,
                BLOCK_WIDTH=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return dx, dresidual, dweight, dbias


def _empty_gradient(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Room for a gradient of the shape of ``tensor``; of no elements where it is not needed."""
    return tensor.new_empty(0) if dtype is None else tensor.new_empty(tensor.shape, dtype=dtype)


@torch.library.custom_op("cab_kernels::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return rms_norm_fwd(x, weight, bias, residual, eps, y_dtype, residual_dtype)


@rms_norm.register_fake
def _(x, weight, bias, residual, eps, y_dtype, residual_dtype):
    return _empty_outputs(x, residual, y_dtype, residual_dtype)


@torch.library.custom_op("cab_kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dx_dtype: torch.dtype | None,
    dresidual_dtype: torch.dtype | None,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rms_norm_bwd(
        dy, dresidual_out, residual_out, weight, rstd, dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype
    )


@rms_norm_backward.register_fake
def _(dy, dresidual_out, residual_out, weight, rstd, dx_dtype, dresidual_dtype, dweight_dtype, dbias_dtype):
    shapes = ((residual_out, dx_dtype), (residual_out, dresidual_dtype), (weight, dweight_dtype), (weight, dbias_dtype))
    return tuple(_empty_gradient(tensor, dtype) for tensor, dtype in shapes)


class RMSNorm(torch.autograd.Function):
    """``(y, residual_out)`` of ``rms_norm``, with their gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, y_dtype, residual_dtype):
        y, residual_out, rstd = rms_norm(x, weight, bias, residual, eps, y_dtype, residual_dtype)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias, residual)]
        ctx.y_dtype = y.dtype
        ctx.is_x = _is_x(x, residual, residual_dtype)
        ctx.save_for_backward(x if ctx.is_x else residual_out, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, x if ctx.is_x else residual_out

    @staticmethod
    def backward(ctx, dy, dresidual_out):
        residual_out, weight, rstd = ctx.saved_tensors
        if dy is None:
            dy = residual_out.new_zeros(residual_out.shape, dtype=ctx.y_dtype)
        wanted = [dtype if needs else None for dtype, needs in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
        dx_dtype, dweight_dtype, dbias_dtype, dresidual_dtype = wanted
        once = dx_dtype == dresidual_dtype  # the same numbers
        dx, dresidual, dweight, dbias = rms_norm_backward(
            dy,
            dresidual_out,
            residual_out,
            weight,
            rstd,
            dx_dtype,
            None if once else dresidual_dtype,
            dweight_dtype,
            dbias_dtype,
        )
        gradients = (dx, dweight, dbias, dx if once else dresidual)
        return (
            *(None if dtype is None else grad for dtype, grad in zip(wanted, gradients, strict=True)),
            None,
            None,
            None,
        )


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    y_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(y, residual_out) of :func:`cab_kernels.rms_norm_fn`."""
    if torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, bias, residual, eps, y_dtype, residual_dtype)
    y, residual_out, _ = rms_norm(x, weight, bias, residual, eps, y_dtype, residual_dtype)
    return y, x if _is_x(x, residual, residual_dtype) else residual_out
