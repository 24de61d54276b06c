"""Causal depthwise convolution of a few new steps in Triton, from a state that holds the steps before them.

A program owns BLOCK_DIM channels of one sequence: one thread holds the whole state of a channel, as a tuple of
STATE_LEN numbers, or of width - 1 where the state is a ring, of which it reads no more than the filter does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_DIM = 128


@triton.jit(do_not_specialize=["length"])
def _causal_conv1d_update_kernel(
    x_ptr, state_ptr, weight_ptr, bias_ptr, seqlens_ptr, indices_ptr, out_ptr, dim, length,
    stride_x, stride_state, stride_out,
    WIDTH: tl.constexpr, STATE_LEN: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_RING: tl.constexpr, HAS_INDICES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    pid_batch = tl.program_id(0).to(tl.int64)
    offs_dim = (tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)).to(tl.int64)
    mask = offs_dim < dim
    x_ptr += pid_batch * stride_x[0] + offs_dim * stride_x[1]
    out_ptr += pid_batch * stride_out[0] + offs_dim * stride_out[1]
    slot = pid_batch
    if HAS_INDICES:
        slot = tl.load(indices_ptr + pid_batch).to(tl.int64)
        if slot < 0:
            for t in range(length):
                tl.store(out_ptr + t * stride_out[2], tl.zeros([BLOCK_DIM], out_ptr.dtype.element_ty), mask=mask)
            return
    state_ptr += slot * stride_state[0] + offs_dim * stride_state[1]

    KEPT: tl.constexpr = WIDTH - 1 if IS_RING else STATE_LEN
    written = 0
    if IS_RING:
        written = tl.load(seqlens_ptr + pid_batch).to(tl.int32) % STATE_LEN
    state = ()
    for i in tl.static_range(KEPT):
        place = (written + STATE_LEN - KEPT + i) % STATE_LEN if IS_RING else i
        state = state + (tl.load(state_ptr + place * stride_state[2], mask=mask, other=0.0).to(tl.float32),)
    weight = ()
    for tap in tl.static_range(WIDTH):
        value = tl.load(weight_ptr + offs_dim * WIDTH + tap, mask=mask, other=0.0)
        weight = weight + (value.to(tl.float32),)
    bias = tl.zeros([BLOCK_DIM], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_dim, mask=mask, other=0.0).to(tl.float32)
    # No thread may overwrite what another one, which holds a copy of the same channel, has still to read.
    tl.debug_barrier()

    for t in range(length):
        x = tl.load(x_ptr + t * stride_x[2], mask=mask, other=0.0).to(tl.float32)
        seen = state[KEPT - (WIDTH - 1) :] + (x,)
        value = bias
        for tap in tl.static_range(WIDTH):
            value = weight[tap] * seen[tap] + value
        if SILU:
            value = value * tl.sigmoid(value)
        tl.store(out_ptr + t * stride_out[2], value.to(out_ptr.dtype.element_ty), mask=mask)
        if IS_RING:
            place = (written + t) % STATE_LEN
            tl.store(state_ptr + place * stride_state[2], x.to(state_ptr.dtype.element_ty), mask=mask)
        state = (state + (x,))[1:]
    if not IS_RING:
        for i in tl.static_range(KEPT):
            tl.store(state_ptr + i * stride_state[2], state[i].to(state_ptr.dtype.element_ty), mask=mask)


def causal_conv1d_update_step(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """Launch the steps of ``x`` (batch, dim, length): advance ``conv_state`` and return ``out``."""
    batch, dim, length = x.shape
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        _causal_conv1d_update_kernel[(batch, triton.cdiv(dim, _BLOCK_DIM))](
            x_ptr=x,
            state_ptr=conv_state,
            weight_ptr=weight.contiguous(),
            bias_ptr=None if bias is None else bias.contiguous(),
            seqlens_ptr=None if cache_seqlens is None else cache_seqlens.contiguous(),
            indices_ptr=None if conv_state_indices is None else conv_state_indices.contiguous(),
            out_ptr=out,
            dim=dim,
            length=length,
            stride_x=x.stride(),
            stride_state=conv_state.stride(),
            stride_out=out.stride(),
            WIDTH=weight.shape[1],
            STATE_LEN=conv_state.shape[2],
            SILU=silu,
            HAS_BIAS=bias is not None,
            IS_RING=cache_seqlens is not None,
            HAS_INDICES=conv_state_indices is not None,
            BLOCK_DIM=_BLOCK_DIM,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
