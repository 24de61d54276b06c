"""Residual add and root-mean-square norm: documentation, checks, choice of implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.norm.reference import output_dtypes, rms_norm_ref

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    backend: str | None = None,
) -> Tensor | Any:  # Any: a pair with prenorm, which no caller should have to tell apart by type
    """Add ``x`` to the residual stream and normalise the sum by its root mean square, in one pass.

    ::

        residual_out = x + residual
        y            = residual_out / sqrt(mean(residual_out ** 2) + eps) * weight + bias

    The mean runs over the last axis. Both lines are computed in float32 and each result is rounded once; ``y`` is that
    of the rounded ``residual_out``.

    Args:
        x: (..., width), any floating dtype, any leading axes or none. Rows that are contiguous, such as a slice of a
            wider tensor, are read in place.
        weight: (width,).
        bias: (width,), or None for no bias.
        residual: of the shape of ``x``, or None, where ``residual_out`` is ``x``.
        eps: added to the mean square.
        prenorm: also return ``residual_out``, the stream for the next block.
        residual_in_fp32: ``residual_out`` has at least float32.
        backend: None chooses by device; "triton" or "reference" is used or refused. Triton takes a width of up to 8192.

    Returns:
        ``y`` of the shape of ``x``, or with ``prenorm`` the pair ``(y, residual_out)``. ``y`` has the dtype of ``x``;
        under ``torch.autocast`` it has autocast's, so that the linear layer after it casts nothing (float64 stays, as
        it does everywhere under autocast). ``residual_out`` has the dtype of ``residual``, or of ``x`` where there is
        none, unless ``residual_in_fp32`` asks for more.

    Gradients reach ``x``, ``weight``, ``bias`` and ``residual``, each in its own dtype, computed in float32 and summed
    in a fixed order. Only ``residual_out`` and one number a row are kept for backward, whose one pass adds up the
    gradients of ``y`` and ``residual_out``. There are no second derivatives on the Triton backend.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names the argument.

    Source: RMSNorm, arXiv:1910.07467, section 3; the arguments are those of mamba_ssm's function of this name.
    """
    check = ArgumentCheck("rms_norm_fn")
    leading = [f"axis{axis}" for axis in range(x.dim() - 1)] if isinstance(x, Tensor) else []
    layout = " ".join([*leading, "width"])
    check.tensor("x", x, layout)
    check.true(x.shape[-1] >= 1, "x of width at least 1", tuple(x.shape))
    check.tensor("weight", weight, "width")
    if bias is not None:
        check.tensor("bias", bias, "width")
    if residual is not None:
        check.tensor("residual", residual, layout)

    if choose_backend(check.function, backend, x) == "reference":
        return rms_norm_ref(x, weight, bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32)
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    for name, tensor in given.items():
        if tensor is not None:
            check.dtype(name, tensor, KERNEL_DTYPES)
    from cab_kernels.norm.kernels import MAX_WIDTH, add_rms_norm

    check.true(x.shape[-1] <= MAX_WIDTH, f"x of width at most {MAX_WIDTH} for backend 'triton'", x.shape[-1])
    y_dtype, residual_dtype = output_dtypes(x, residual, residual_in_fp32)
    y, residual_out = add_rms_norm(x, weight, bias, residual, eps, y_dtype, residual_dtype)
    return (y, residual_out) if prenorm else y
