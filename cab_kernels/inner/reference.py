"""A Mamba block between its input and its output projection: the definitions, and what runs on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels.conv.op import sequence_index
from cab_kernels.conv.reference import causal_conv1d_ref
from cab_kernels.scan.bidirectional import bidirectional_selective_scan_ref
from cab_kernels.scan.reference import selective_scan_ref

Pair = Sequence[Tensor]


def mamba_inner_ref(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    norm_eps: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define :func:`cab_kernels.mamba_inner_fn`, in float32 or better, each result rounded once."""
    given = [xz, conv_weight, x_proj, dt_proj, dt_bias, A_log, D, *([] if conv_bias is None else [conv_bias])]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given), torch.float32)
    rank, dstate = dt_proj.shape[1], A_log.shape[1]
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.to(dtype).mT.chunk(2, dim=1)
        seq_idx = None if cu_seqlens is None else sequence_index(cu_seqlens, x.shape[2])
        u = causal_conv1d_ref(x, conv_weight, conv_bias, "silu", seq_idx=seq_idx)
        if mask is not None:
            u = u * mask.to(dtype).unsqueeze(1)
        parts = F.linear(u.mT, x_proj.to(dtype)).split([rank, dstate, dstate], dim=-1)
        if norm_eps is not None:
            parts = [part * torch.rsqrt(part.square().mean(-1, keepdim=True) + norm_eps) for part in parts]
        dt, B, C = parts
        out: Any = selective_scan_ref(
            u,
            F.linear(dt, dt_proj.to(dtype)).mT,
            -torch.exp(A_log.to(dtype)),
            B.mT,
            C.mT,
            D,
            z,
            dt_bias,
            True,
            cu_seqlens=cu_seqlens,
        )
    return out.mT.to(xz.dtype), B.to(xz.dtype), C.to(xz.dtype)


def bidirectional_mamba_inner_ref(
    xz: Tensor,
    conv_weight: Pair,
    conv_bias: Pair,
    x_proj: Pair,
    dt_proj: Pair,
    dt_bias: Pair,
    A_log: Pair,
    D: Pair,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Define :func:`cab_kernels.bidirectional_mamba_inner_fn`, in float32 or better, each result rounded once."""
    given = [xz, *conv_weight, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A_log, *D]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in given), torch.float32)
    rank, dstate = dt_proj[0].shape[1], A_log[0].shape[1]
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.to(dtype).transpose(1, 2).chunk(2, dim=1)
        us, deltas, Bs, Cs = [], [], [], []
        for way in range(2):
            u = causal_conv1d_ref(x, conv_weight[way], conv_bias[way], "silu", reverse=bool(way))
            low_rank, B, C = F.linear(u.transpose(1, 2), x_proj[way].to(dtype)).split([rank, dstate, dstate], dim=-1)
            us.append(u)
            deltas.append(F.linear(low_rank, dt_proj[way].to(dtype)).transpose(1, 2))
            Bs.append(B)
            Cs.append(C)
        out = bidirectional_selective_scan_ref(
            us,
            deltas,
            [-torch.exp(a_log.to(dtype)) for a_log in A_log],
            [B.transpose(1, 2) for B in Bs],
            [C.transpose(1, 2) for C in Cs],
            D,
            z,
            dt_bias,
            True,
        )
    return out.transpose(1, 2).to(xz.dtype), [B.to(xz.dtype) for B in Bs], [C.to(xz.dtype) for C in Cs]
