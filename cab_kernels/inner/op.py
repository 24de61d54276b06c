"""A Mamba block between its projections: documentation, checks, choice of implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import FLOATING, ArgumentCheck
from cab_kernels.inner.reference import mamba_inner_ref
from cab_kernels.scan.op import KERNEL_DTYPES, MAX_DSTATE, check_packing

LAYOUTS = {
    "conv_weight": "dim width",
    "conv_bias": "dim",
    "x_proj": "rank+2dstate dim",
    "dt_proj": "dim rank",
    "dt_bias": "dim",
    "A_log": "dim dstate",
    "D": "dim",
}


def check_xz(check: ArgumentCheck, xz: Tensor) -> None:
    check.tensor("xz", xz, "batch length 2dim")
    check.true(xz.shape[2] % 2 == 0, "xz of an even number of channels", xz.shape[2])
    check.sizes["dim"] = xz.shape[2] // 2


def check_sizes(check: ArgumentCheck) -> None:
    """Whether the sizes of parameters that have been checked one by one go together."""
    rank, dstate, rows = (check.sizes[name] for name in ("rank", "dstate", "rank+2dstate"))
    check.true(1 <= dstate <= MAX_DSTATE, f"dstate (A_log's second axis) from 1 to {MAX_DSTATE}", dstate)
    check.true(rows == rank + 2 * dstate, f"x_proj with rank + 2 dstate = {rank + 2 * dstate} rows", rows)


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
    check_xz(check, xz)
    parameters = zip(LAYOUTS, (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D), strict=True)
    given: dict[str, Any] = {name: tensor for name, tensor in parameters if name != "conv_bias" or tensor is not None}
    for name, tensor in given.items():
        check.tensor(name, tensor, LAYOUTS[name])
    check_sizes(check)
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
    for name, tensor in {"xz": xz, **given}.items():
        check.dtype(name, tensor, KERNEL_DTYPES)
    from cab_kernels.inner.kernels import mamba_inner_triton

    return mamba_inner_triton(
        xz, conv_weight, conv_bias, x_proj.to(xz.dtype), dt_proj.to(xz.dtype), dt_bias, -torch.exp(A_log.float()), D,
        mask, cu_seqlens, norm_eps,
    )  # fmt: skip
