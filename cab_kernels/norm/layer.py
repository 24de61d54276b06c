"""Layer norm for models that are not trained: documentation, definition, checks, choice of implementation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.norm.op import KERNEL_DTYPES
from cab_kernels.norm.reference import output_dtypes


def frozen_layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Define :func:`cab_kernels.frozen_layer_norm_fn`, in float32 or better, rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = F.layer_norm(x.to(dtype), weight.shape, weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    return y.to(output_dtypes(x, None, False)[0])


def frozen_layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """Normalise rows to mean 0 and variance 1, without a gradient: for a frozen model.

    ``y = (x - mean(x)) / sqrt(mean((x - mean(x)) ** 2) + eps) * weight + bias``, over the last axis, in float32 and
    rounded once.

    Args:
        x: (..., width), any floating dtype.
        weight, bias: (width,), the latter None for no bias.
        eps: added to the variance.
        backend: None chooses by device; "triton" or "reference" is used or refused. Triton takes a width of up to 8192.

    Returns:
        y of the shape of ``x``, contiguous, in the dtype of ``x``, or under ``torch.autocast`` in autocast's, so that
        the linear layer after it casts nothing.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names the argument.
        RuntimeError: a gradient is wanted.

    Source: layer normalisation, arXiv:1607.06450, section 3.
    """
    check = ArgumentCheck("frozen_layer_norm_fn")
    leading = [f"axis{axis}" for axis in range(x.dim() - 1)] if isinstance(x, Tensor) else []
    check.tensor("x", x, " ".join([*leading, "width"]))
    check.tensor("weight", weight, "width")
    if bias is not None:
        check.tensor("bias", bias, "width")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        raise RuntimeError(f"{check.function}: expected no_grad or frozen tensors, got one that wants a gradient")
    if choose_backend(check.function, backend, x) == "reference":
        return frozen_layer_norm_ref(x, weight, bias, eps)
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check.dtype(name, tensor, KERNEL_DTYPES)
    from cab_kernels.norm.kernels import MAX_WIDTH
    from cab_kernels.norm.layer_kernels import frozen_layer_norm

    check.true(x.shape[-1] <= MAX_WIDTH, f"x of width at most {MAX_WIDTH} for backend 'triton'", x.shape[-1])
    return frozen_layer_norm(x, weight, bias, eps, output_dtypes(x, None, False)[0])
