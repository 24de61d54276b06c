"""Layer norm, forward only, in Triton.

    y = (x - mean) / sqrt(mean((x - mean)^2) + eps) weight + bias

A program owns one tile of whole rows, as in ``kernels.py``, which it reads once and writes once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cab_kernels.norm.kernels import row_tiling


@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, rows, width, eps, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    inside = column < width
    mask = (row < rows) & inside
    x = tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / width, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1, keep_dims=True) / width + eps))
    y = x * rstd * tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cab_kernels::frozen_layer_norm", mutates_args=())
def frozen_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, y_dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=y_dtype)
    width = x.shape[-1]
    rows = x.numel() // max(1, width)
    tiling = row_tiling(width)
    with torch.cuda.device_of(x):
        _layer_norm_kernel[(triton.cdiv(rows, tiling["BLOCK_ROWS"]),)](
            x.contiguous(),
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            rows,
            width,
            eps,
            enable_fp_fusion=True,
            **tiling,
        )
    return y


@frozen_layer_norm.register_fake
def _(x, weight, bias, eps, y_dtype):
    return x.new_empty(x.shape, dtype=y_dtype)
