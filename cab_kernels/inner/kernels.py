"""A Mamba block between its projections, on the kernels: one op for each pass.

    u = mask silu(conv(x))     dt | B | C = x_proj u     delta = dt_proj dt     out = scan(u, delta, A, B, C, D, z)

Kept for backward: xz, the projections dt | B | C and the scan's states. Made again: u, delta and, where dt, B and C are
normed, their norms. Gradients are written where they are wanted: those of x and z as the halves of one tensor, those of
dt, B and C as parts of one, and what x_proj adds to that of u is added by its product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cab_kernels.conv.kernels import causal_conv1d_bwd, causal_conv1d_fwd
from cab_kernels.conv.op import sequence_index
from cab_kernels.scan.launch_backward_kernels import new_gradients, selective_scan_bwd
from cab_kernels.scan.launch_forward_kernels import new_results, selective_scan_fwd
from cab_kernels.scan.launch_kernels import span_for


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """u of x, (batch, dim, length) both."""
    u = causal_conv1d_fwd(x, weight, bias, None, seq_idx, True, False)
    return u if mask is None else u.mul_(mask.unsqueeze(1))


def _sequences(xz: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else sequence_index(cu_seqlens, xz.shape[1])


def _parts(projected: Tensor, dt_proj: Tensor, A: Tensor) -> Sequence[Tensor]:
    """dt, B and C, of the last axis of their projections."""
    return projected.split([dt_proj.shape[1], A.shape[1], A.shape[1]], dim=-1)


def _normed(part: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """A part over its root mean square, and one over that, both in float32."""
    part = part.float()
    rstd = torch.rsqrt(part.square().mean(-1, keepdim=True) + norm_eps)
    return part * rstd, rstd


def _scanned_parts(projected: Tensor, dt_proj: Tensor, A: Tensor, norm_eps: float | None) -> Sequence[Tensor]:
    """dt, B and C as they go on, (batch, length, ...)."""
    parts = _parts(projected, dt_proj, A)
    return parts if norm_eps is None else [_normed(part, norm_eps)[0].to(part.dtype) for part in parts]


def _through_norm(gradient: Tensor, part: Tensor, norm_eps: float) -> Tensor:
    """The gradient of a part, from that of its norm."""
    normed, rstd = _normed(part, norm_eps)
    gradient = gradient.float()
    return rstd * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))


def _rows(tensor: Tensor) -> Tensor:
    """(batch length, ...) of (batch, length, ...), the same memory."""
    return tensor.view(tensor.shape[0] * tensor.shape[1], tensor.shape[2])


@torch.library.custom_op("cab_kernels::mamba_inner", mutates_args=())
def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_eps: float | None,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, the projections (batch, length, rank + 2 dstate) before any norm, and a scan's state in ``keep`` steps."""
    with torch.autocast(xz.device.type, enabled=False):
        x, z = xz.contiguous().mT.chunk(2, dim=1)
        u = _convolve(x, conv_weight, conv_bias, mask, _sequences(xz, cu_seqlens))
        projected = F.linear(u.mT, x_proj)
        dt, B, C = _scanned_parts(projected, dt_proj, A, norm_eps)
        delta = F.linear(dt, dt_proj).mT
        out, _, states = selective_scan_fwd(
            u, delta, A, B.mT, C.mT, D, z, dt_bias, None, cu_seqlens, True, False, False, keep
        )
    return out.mT, projected, states


@mamba_inner.register_fake
def _(xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, mask, cu_seqlens, norm_eps, keep):
    batch, length, channels = xz.shape
    out = xz.new_empty(batch, length, channels // 2)
    states = new_results(out.mT, A, cu_seqlens, False, keep)[2]
    return out, xz.new_empty(batch, length, x_proj.shape[0]), states


@torch.library.custom_op("cab_kernels::mamba_inner_backward", mutates_args=())
def mamba_inner_backward(
    dout: Tensor,
    dB: Tensor | None,
    dC: Tensor | None,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    projected: Tensor,
    states: Tensor,
    norm_eps: float | None,
) -> list[Tensor]:
    """The gradients of ``mamba_inner`` from xz to D, that of no bias without elements. It has none of its own.

    dB and dC are what others, who have seen B and C, give them.
    """
    with torch.autocast(xz.device.type, enabled=False):
        xz = xz.contiguous()
        dxz, dprojected = torch.empty_like(xz), torch.empty_like(projected)
        (x, z), (dx, dz) = (both.mT.chunk(2, dim=1) for both in (xz, dxz))
        seq_idx = _sequences(xz, cu_seqlens)
        u = _convolve(x, conv_weight, conv_bias, mask, seq_idx)
        parts = _scanned_parts(projected, dt_proj, A, norm_eps)
        dt, B, C = parts
        delta = F.linear(dt, dt_proj).mT
        dparts = _parts(dprojected, dt_proj, A)
        inputs = (u, delta, A, B.mT, C.mT, D, z, dt_bias, None)
        du, ddelta, dA, dD, ddt_bias = new_gradients((u, delta, A, D, dt_bias), [True] * 5)
        selective_scan_bwd(
            dout.contiguous().mT, None, *inputs, cu_seqlens, states, True, False,
            [du, ddelta, dA, dparts[1].mT, dparts[2].mT, dD, dz, ddt_bias, None],
        )  # fmt: skip
        ddelta = _rows(ddelta.mT)
        torch.mm(ddelta, dt_proj, out=_rows(dparts[0]))
        ddt_proj = ddelta.mT @ _rows(dt)
        for dpart, other in zip(dparts[1:], (dB, dC), strict=True):
            if other is not None:
                dpart += other
        if norm_eps is not None:
            for dpart, part in zip(dparts, _parts(projected, dt_proj, A), strict=True):
                dpart.copy_(_through_norm(dpart, part, norm_eps))
        dx_proj = _rows(dprojected).mT @ _rows(u.mT)
        _rows(du.mT).addmm_(_rows(dprojected), x_proj)
        if mask is not None:
            du.mul_(mask.unsqueeze(1))
        _, dconv_weight, dconv_bias, _ = causal_conv1d_bwd(
            du, x, conv_weight, conv_bias, None, seq_idx, True, False, True, True, dx=dx
        )
    return [dxz, dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD]


@mamba_inner_backward.register_fake
def _(dout, dB, dC, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, *rest):
    inputs = (xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D)
    return [xz.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]


class MambaInner(torch.autograd.Function):
    """``(out, B, C)`` of ``mamba_inner``, with their gradient. All of its inputs get one, or none."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.norm_eps = arguments
        xz, A = tensors[0], tensors[6]
        out, projected, states = mamba_inner(*arguments, span_for(xz.mT.chunk(2, dim=1)[0], A))
        ctx.save_for_backward(*tensors, projected, states)
        ctx.set_materialize_grads(False)
        return out, *_projections(projected, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dB, dC):
        xz, _, conv_bias, *_ = ctx.saved_tensors
        if dout is None:
            dout = xz.new_zeros(*xz.shape[:2], xz.shape[2] // 2)
        gradients = mamba_inner_backward(dout, dB, dC, *ctx.saved_tensors, ctx.norm_eps)
        if conv_bias is None:
            gradients[2] = None
        return *gradients, None, None, None


def _projections(projected, *arguments) -> tuple[Any, Any]:
    """B and C of what ``mamba_inner`` was given and gave."""
    _, _, _, _, dt_proj, _, A, _, _, _, norm_eps = arguments
    _, B, C = _scanned_parts(projected, dt_proj, A, norm_eps)
    return B, C


def mamba_inner_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, B and C of :func:`cab_kernels.mamba_inner_fn`; x_proj and dt_proj are of xz's dtype, A is float32."""
    if torch.is_grad_enabled() and any(isinstance(given, Tensor) and given.requires_grad for given in arguments):
        return MambaInner.apply(*arguments)
    out, projected, _ = mamba_inner(*arguments, 0)
    return out, *_projections(projected, *arguments)
