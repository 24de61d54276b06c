"""The operations of mamba_ssm and causal_conv1d under their own names and signatures, run by these kernels.

In code written for those packages, import from here instead::

    from cab_kernels.compat import causal_conv1d_fn, causal_conv1d_update
    from cab_kernels.compat import mamba_inner_fn, rms_norm_fn, selective_scan_fn, selective_state_update

``rms_norm_fn``, ``selective_scan_fn``, ``selective_state_update`` and ``causal_conv1d_update`` are this package's own
functions, whose signatures begin with those of the originals; what follows ``residual`` in ``rms_norm_fn`` goes by
name, and its dropout and second norm are not here. What differs from the originals is what they lack: mixed dtypes, any
strides, CPU tensors, and a gradient through the last state. A complex ``A`` raises ``NotImplementedError``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from cab_kernels.conv import causal_conv1d_fn as _causal_conv1d_fn
from cab_kernels.conv import causal_conv1d_update
from cab_kernels.norm import rms_norm_fn
from cab_kernels.scan.op import selective_scan_fn
from cab_kernels.scan.step import selective_state_update

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_inner_fn",
    "rms_norm_fn",
    "selective_scan_fn",
    "selective_state_update",
]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | Any:  # Any: a pair with return_final_states, as in cab_kernels.causal_conv1d_fn
    """Run :func:`cab_kernels.causal_conv1d_fn` with the arguments of ``causal_conv1d.causal_conv1d_fn``.

    ``final_states_out``, (batch, dim, width - 1), is written with the final states, which are then returned in it; it
    needs ``return_final_states``.

    Raises:
        ValueError: ``final_states_out`` is given without ``return_final_states``, or what
            :func:`cab_kernels.causal_conv1d_fn` raises.
    """
    if final_states_out is not None and not return_final_states:
        raise ValueError("causal_conv1d_fn: expected return_final_states with final_states_out, got False")
    result = _causal_conv1d_fn(
        x,
        weight,
        bias,
        activation,
        initial_states=initial_states,
        return_final_states=return_final_states,
        seq_idx=seq_idx,
    )
    if final_states_out is None:
        return result
    out, final_states = result
    return out, final_states_out.copy_(final_states)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Run a Mamba block from the output of its input projection to that of its output projection.

    Convolution with SiLU, the projections of the step, B and C from its result, the selective scan gated by z, and the
    output projection: arXiv:2312.00752, section 3.4.

    Args:
        xz: (batch, 2 dim, length); x is its first half, z the second.
        conv1d_weight, conv1d_bias: (dim, 1, width) as ``nn.Conv1d`` keeps it, and (dim,).
        x_proj_weight: (dt_rank + dstate, twice if B and C are both projected, dim).
        delta_proj_weight: (dim, dt_rank).
        out_proj_weight, out_proj_bias: (width of the model, dim) and (width of the model,).
        A, D, delta_bias, delta_softplus: as for :func:`selective_scan_fn`.
        B, C: None to project them from the input, else as for :func:`selective_scan_fn`.
        B_proj_bias, C_proj_bias: (dstate,), added to the projected B and C.
        checkpoint_lvl: accepted and without effect: the result of the convolution and the step stay for backward.
        b_rms_weight, c_rms_weight, dt_rms_weight: weights of a root-mean-square norm of B, C and the low-rank step
            before its projection, where given; b_c_dt_rms_eps is its epsilon.

    Returns:
        (batch, length, width of the model).

    It is a composition: every argument that is a floating tensor gets its exact gradient, ``out_proj_bias`` and the
    norms' weights included. Under autocast the three projections run in autocast's dtype, all else in its input's.
    """
    dt_rank, dstate = delta_proj_weight.shape[1], A.shape[-1]
    if xz.stride(2) == 1:
        x, z = xz.chunk(2, dim=1)
    else:  # as a linear layer leaves it: so the gradients of the halves are joined in its layout
        x, z = (half.mT for half in xz.mT.chunk(2, dim=2))
    u = _causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, "silu")
    projected = F.linear(u.transpose(1, 2), x_proj_weight)
    low_rank = _normalised(projected[..., :dt_rank], dt_rms_weight, b_c_dt_rms_eps)
    delta = F.linear(low_rank, delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _projection(projected[..., dt_rank : dt_rank + dstate], B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = _projection(projected[..., -dstate:], C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _projection(projected: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """B or C, (batch, dstate, length), from its part of the projection, (batch, length, dstate)."""
    if bias is not None:
        projected = projected + bias.to(projected.dtype)
    return _normalised(projected, rms_weight, eps).transpose(1, 2)


def _normalised(x: Tensor, rms_weight: Tensor | None, eps: float) -> Tensor:
    return x if rms_weight is None else F.rms_norm(x, rms_weight.shape, rms_weight.to(x.dtype), eps)
