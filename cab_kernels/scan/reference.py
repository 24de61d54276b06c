"""The selective scan in plain PyTorch: the definition that the kernels are held to, and what runs on a CPU."""

from __future__ import annotations

import functools
import math
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Define ``selective_scan_fn``, which says what the arguments are; any device, any real dtype, no checks.

    Everything is computed in the widest dtype among the inputs and float32, and rounded once, at the end. Time is
    the only loop. Backward keeps one state in about sqrt(length) steps and computes the others again.
    """
    if cu_seqlens is not None:
        out, last_state = _scan_packed(
            cu_seqlens, u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse
        )
    else:
        out, last_state = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse)
    return (out, last_state) if return_last_state else out


def _scan_packed(
    cu_seqlens: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Scan each sequence by itself, and put the results side by side."""
    lengths = cu_seqlens.diff().tolist()

    def parts(tensor: Tensor | None, constant: bool = False) -> list[Any]:
        # split, not slices: the gradient of each slice would be as long as the whole tensor
        return [tensor] * len(lengths) if tensor is None or constant else list(tensor.split(lengths, dim=-1))

    states = [None] * len(lengths) if initial_state is None else initial_state.split(1)
    inputs = zip(parts(u), parts(delta), parts(B, B.dim() == 2), parts(C, C.dim() == 2), parts(z), states, strict=True)
    scans = [
        _scan(u_i, delta_i, A, B_i, C_i, D, z_i, delta_bias, delta_softplus, state_i, reverse)
        for u_i, delta_i, B_i, C_i, z_i, state_i in inputs
    ]
    out = torch.cat([out for out, _ in scans], dim=-1)
    return _in_layout_of(u, out), torch.cat([last_state for _, last_state in scans])


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    given = [t.dtype for t in (u, delta, A, B, C, D, z, delta_bias, initial_state) if t is not None]
    dtype = functools.reduce(torch.promote_types, given, torch.float32)
    (batch, dim, _), dstate = u.shape, A.shape[1]
    groups = next((matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4), 1)
    by_group = (groups, dim // groups)

    def steps(tensor: Tensor) -> Tensor:
        """(batch, ..., length) as (length, batch, ...), in the order in which the scan meets the steps."""
        tensor = tensor.movedim(-1, 0)
        return tensor.flip(0) if reverse else tensor

    def channels(tensor: Tensor) -> Tensor:
        """(batch, dim, length) as (length, batch, groups, 1, channels)."""
        return steps(tensor).unflatten(2, by_group).unsqueeze(-2)

    def projection(matrix: Tensor) -> Tensor:
        """B or C as (length, batch, groups, dstate, 1), or (1, 1, groups, dstate, channels) if constant."""
        matrix = matrix.to(dtype)
        if matrix.dim() == 2:
            return matrix.unflatten(0, by_group).mT[None, None]
        return steps(matrix if matrix.dim() == 4 else matrix.unsqueeze(1)).unsqueeze(-1)

    u_wide, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = u_wide.new_zeros(batch, dim, dstate) if initial_state is None else initial_state.to(dtype)
    y, last_state = _Recurrence.apply(
        channels(delta),
        channels(delta * u_wide),
        A.to(dtype).unflatten(0, by_group).mT,
        projection(B),
        projection(C),
        state.unflatten(1, by_group).mT,
    )
    y, last_state = y.flatten(2).movedim(0, -1), last_state.mT.flatten(1, 2)
    if reverse:
        y = y.flip(-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u_wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return _in_layout_of(u, y.to(u.dtype)), last_state


def _in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` with the strides of ``empty_like(like)``: dense, axes ordered in memory as those of ``like``."""
    strides = torch.empty_like(like, device="meta").stride()
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class _Recurrence(torch.autograd.Function):
    """y_t = <C_t, h_t> for h_t = exp(delta_t A) h_{t-1} + x_t B_t, and the state after the last step.

    All broadcast to (length, batch, groups, dstate, channels); the long axis is last. Within a chunk of about
    sqrt(length) steps everything is vectorised over time but the recurrence itself, one ``addcmul`` a step. Only the
    state before each chunk outlives forward; backward runs every chunk again from there.
    """

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        delta, x, A, state = delta.contiguous(), x.contiguous(), A.contiguous(), state.contiguous()
        y = torch.empty_like(x)
        befores, buffers = [], _chunk_buffers(2, len(x), state)
        for chunk in _chunks(len(x)):
            befores.append(state)
            scratch, states = (buffer[: len(x[chunk])] for buffer in buffers)
            _run_chunk(delta[chunk], x[chunk], A, _of_chunk(B, chunk), state, decay=scratch, states=states)
            state = states[-1].clone()
            torch.sum(torch.mul(states, _of_chunk(C, chunk), out=scratch), -2, keepdim=True, out=y[chunk])
        ctx.save_for_backward(delta, x, A, B, C, *befores)
        return y, state.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast_state: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            gradients = _Recurrence.gradients(*ctx.saved_tensors, dy=dy, dlast_state=dlast_state)
        if torch.is_grad_enabled():
            return _NoSecondDerivative.apply(*gradients, dy, dlast_state, *ctx.saved_tensors[:5])
        return gradients

    @staticmethod
    def gradients(
        delta: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, *befores: Tensor, dy: Tensor, dlast_state: Tensor
    ) -> tuple[Tensor, ...]:
        ddelta, dx = torch.empty_like(delta), torch.empty_like(x)
        dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
        dy, dstate = dy.contiguous(), dlast_state.contiguous()
        buffers = _chunk_buffers(4, len(x), dstate)
        for chunk, before in reversed(list(zip(_chunks(len(x)), befores, strict=True))):
            delta_c, x_c, dy_c, B_c, C_c = delta[chunk], x[chunk], dy[chunk], _of_chunk(B, chunk), _of_chunk(C, chunk)
            decay, states, dstates, scratch = (buffer[: len(x_c)] for buffer in buffers)
            _run_chunk(delta_c, x_c, A, B_c, before, decay=decay, states=states)
            torch.mul(dy_c, C_c, out=dstates)
            dstates[-1] += dstate
            for t in reversed(range(len(dstates) - 1)):
                dstates[t].addcmul_(decay[t + 1], dstates[t + 1])
            torch.sum(torch.mul(dstates, B_c, out=scratch), -2, keepdim=True, out=dx[chunk])
            _of_chunk(dB, chunk).add_(torch.mul(dstates, x_c, out=scratch).sum_to_size(B_c.shape))
            _of_chunk(dC, chunk).add_(torch.mul(states, dy_c, out=scratch).sum_to_size(C_c.shape))
            dstates *= decay
            dstate = dstates[0].clone()
            dstates[0] *= before
            dstates[1:] *= states[:-1]  # and so the gradient of the exponent, delta * A
            torch.sum(torch.mul(dstates, A, out=scratch), -2, keepdim=True, out=ddelta[chunk])
            dA += torch.mul(dstates, delta_c, out=scratch).sum((0, 1))
        return ddelta, dx, dA, dB, dC, dstate


class _NoSecondDerivative(torch.autograd.Function):
    """The first six of its arguments, gradients that depend on the others in a way that has no derivative here."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in given[:6])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise RuntimeError("selective_scan_ref: expected first derivatives, got a second one, which is not defined")


def _run_chunk(
    delta: Tensor, x: Tensor, A: Tensor, B: Tensor, before: Tensor, *, decay: Tensor, states: Tensor
) -> None:
    """Write the decay of each step of a chunk, and the state after it."""
    torch.mul(delta, A, out=decay).exp_()
    torch.mul(x, B, out=states)
    for decay_t, state in zip(decay, states, strict=True):
        before = state.addcmul_(decay_t, before)


def _chunk_size(length: int) -> int:
    return math.isqrt(length) + 1


def _chunks(length: int) -> list[slice]:
    size = _chunk_size(length)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _chunk_buffers(count: int, length: int, state: Tensor) -> tuple[Tensor, ...]:
    """Room for a chunk of states, ``count`` times: allocated anew in each chunk, it costs more than the arithmetic."""
    return state.new_empty(count, _chunk_size(length), *state.shape).unbind()


def _of_chunk(matrix: Tensor, chunk: slice) -> Tensor:
    return matrix[chunk] if len(matrix) > 1 else matrix
