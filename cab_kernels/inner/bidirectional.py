"""A bidirectional Mamba block between its projections: documentation, checks, choice of implementation."""

from __future__ import annotations

from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.inner.op import LAYOUTS, check_sizes, check_xz
from cab_kernels.inner.reference import Pair, bidirectional_mamba_inner_ref
from cab_kernels.scan.op import KERNEL_DTYPES


def bidirectional_mamba_inner_fn(
    xz: Tensor,
    conv_weight: Pair,
    conv_bias: Pair,
    x_proj: Pair,
    dt_proj: Pair,
    dt_bias: Pair,
    A_log: Pair,
    D: Pair,
    *,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run a bidirectional Mamba block from the output of its input projection to the input of its output projection.

    ::

        x, z          = the halves of xz
        u[i]          = silu(causal convolution of x)                       against time for i = 1
        dt, B[i], C[i] = the parts of x_proj[i] u[i]
        delta[i]      = softplus(dt_proj[i] dt + dt_bias[i])
        out           = sum over i of  selective scan of u[i], delta[i], -exp(A_log[i]), B[i], C[i], D[i], gated by z

    Of a pair, the first runs from the first step to the last and the second the other way; see
    :func:`cab_kernels.causal_conv1d_fn` and :func:`cab_kernels.bidirectional_selective_scan_fn`, of which the kernels
    are. For backward only xz, dt, B, C and a state in every so many steps are kept: u and delta are made again.

    Args:
        xz: (batch, length, 2 dim). Its dtype is that of the products, whatever autocast says.
        conv_weight, conv_bias: pairs of (dim, width) and (dim,).
        x_proj: a pair of (rank + 2 dstate, dim).
        dt_proj, dt_bias: pairs of (dim, rank) and (dim,).
        A_log: a pair of (dim, dstate).
        D: a pair of (dim,).
        backend: None chooses by device; "triton" or "reference" is used or refused.

    Returns:
        out, (batch, length, dim), and the two B and the two C, (batch, length, dstate) each, all of xz's dtype. Every
        input gets its gradient, through all results, in its own dtype, once: a second derivative raises.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        ImportError: Triton is needed and not installed.

    Source: Vision Mamba, arXiv:2401.09417, section 3.3 and algorithm 1.
    """
    check = ArgumentCheck("bidirectional_mamba_inner_fn")
    check_xz(check, xz)
    pairs = dict(zip(LAYOUTS, (conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D), strict=True))
    for name, pair in pairs.items():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            got = f"{len(pair)} of them" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise TypeError(f"{check.function}: expected {name} to be a pair of tensors, got {got}")
        for way in range(2):
            check.tensor(f"{name}[{way}]", pair[way], LAYOUTS[name])
            check.dtype(f"{name}[{way}]", pair[way], (pair[0].dtype,))
    check_sizes(check)
    if choose_backend(check.function, backend, xz) == "reference":
        return bidirectional_mamba_inner_ref(xz, *pairs.values())
    check.dtype("xz", xz, KERNEL_DTYPES)
    for name, pair in pairs.items():
        check.dtype(name, pair[0], KERNEL_DTYPES)
    from cab_kernels.inner.bidirectional_kernels import bidirectional_mamba_inner_triton

    return bidirectional_mamba_inner_triton(xz, *pairs.values())
