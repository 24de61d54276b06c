"""A Mamba block between its projections: documentation, checks, the definition, choice of implementation."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import FLOATING, ArgumentCheck
from cab_kernels.conv.op import sequence_index
from cab_kernels.conv.reference import causal_conv1d_ref
from cab_kernels.scan.op import KERNEL_DTYPES, MAX_DSTATE, check_packing
from cab_kernels.scan.reference import selective_scan_ref


def mamba_inner_fn(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a Mamba block from the output of its input projection to the input of its output projection.

    ::

        x, z     = the halves of xz
        u        = mask silu(causal convolution of x)
        dt, B, C = the parts of x_proj u, each over its root mean square if there is a norm_eps
        delta    = softplus(dt_proj dt + dt_bias)
        out      = selective scan of u, delta, -exp(A_log), B, C, D, gated by z

    See :func:`cab_kernels.causal_conv1d_fn` and :func:`cab_kernels.selective_scan_fn`, of which the kernels are. For
    backward only xz, dt, B, C and a state in every so many steps are kept: u and delta are made again.

    Args:
        xz: (batch, length, 2 dim). Its dtype is that of the products, whatever autocast says.
        conv_weight, conv_bias: (dim, width) and (dim,), or no bias.
        x_proj: (rank + 2 dstate, dim).
        dt_proj, dt_bias: (dim, rank) and (dim,).
        A_log: (dim, dstate).
        D: (dim,).
        norm_eps: added to the mean squares of dt, B and C, which FalconMamba norms; None for no norm.
        mask: (batch, length), 0 where a step is padding.
        cu_seqlens: as for :func:`cab_kernels.selective_scan_fn`: batch is 1, and state and convolution start again.
        backend: None chooses by device; "triton" or "reference" is used or refused.

    Returns:
        out, (batch, length, dim), and B and C, (batch, length, dstate) each, as the scan takes them; all of xz's dtype.
        xz and the parameters get their gradients, through all results, each in its own dtype, once: a second
        derivative raises.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        ImportError: Triton is needed and not installed.

    Source: Mamba, arXiv:2312.00752, section 3.4; its norms: FalconMamba, arXiv:2410.05355, section 2.2.
    """
    check = ArgumentCheck("mamba_inner_fn")
    check.tensor("xz", xz, "batch length 2dim")
    check.true(xz.shape[2] % 2 == 0, "xz of an even number of channels", xz.shape[2])
    check.sizes["dim"] = xz.shape[2] // 2
    parameters: dict[str, tuple[Any, str]] = {
        "conv_weight": (conv_weight, "dim width"),
        "conv_bias": (conv_bias, "dim"),
        "x_proj": (x_proj, "rank+2dstate dim"),
        "dt_proj": (dt_proj, "dim rank"),
        "dt_bias": (dt_bias, "dim"),
        "A_log": (A_log, "dim dstate"),
        "D": (D, "dim"),
    }
    given = {"xz": xz}
    for name, (tensor, layout) in parameters.items():
        if tensor is not None or name != "conv_bias":
            given[name] = tensor
            check.tensor(name, tensor, layout)
    rank, dstate = check.sizes["rank"], check.sizes["dstate"]
    check.true(1 <= dstate <= MAX_DSTATE, f"dstate (A_log's second axis) from 1 to {MAX_DSTATE}", dstate)
    rows = check.sizes["rank+2dstate"]
    check.true(rows == rank + 2 * dstate, f"x_proj with rank + 2 dstate = {rank + 2 * dstate} rows", rows)
    if mask is not None:
        check.tensor("mask", mask, "batch length", (*FLOATING, torch.bool, torch.int32, torch.int64))
        mask = mask.to(xz.dtype)
    if cu_seqlens is not None:
        check_packing(check, cu_seqlens)
    if choose_backend(check.function, backend, xz) == "reference":
        return mamba_inner_ref(
            xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D,
            norm_eps=norm_eps, mask=mask, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    for name, tensor in given.items():
        check.dtype(name, tensor, KERNEL_DTYPES)
    from cab_kernels.inner.causal_kernels import mamba_inner_triton

    return mamba_inner_triton(
        xz, conv_weight, conv_bias, x_proj.to(xz.dtype), dt_proj.to(xz.dtype), dt_bias, -torch.exp(A_log.float()), D,
        mask, cu_seqlens, norm_eps,
    )  # fmt: skip


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
