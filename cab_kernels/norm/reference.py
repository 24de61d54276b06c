"""Residual add and root-mean-square norm: the definition, in plain PyTorch, and what runs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def output_dtypes(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``y`` and of ``residual_out``, as :func:`cab_kernels.rms_norm_fn` says."""
    y_dtype, device = x.dtype, x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # which autocast leaves alone
        y_dtype = torch.get_autocast_dtype(device)
    residual_dtype = x.dtype if residual is None else residual.dtype
    return y_dtype, torch.promote_types(residual_dtype, torch.float32) if residual_in_fp32 else residual_dtype


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | Any:
    """Define :func:`cab_kernels.rms_norm_fn`, whose arguments these are, in float32 or better, each rounded once."""
    y_dtype, residual_dtype = output_dtypes(x, residual, residual_in_fp32)
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual_dtype), torch.float32)
    residual_out = x if residual is None else x.to(dtype) + residual.to(dtype)
    residual_out = residual_out.to(residual_dtype)
    total = residual_out.to(dtype)
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return (y.to(y_dtype), residual_out) if prenorm else y.to(y_dtype)
