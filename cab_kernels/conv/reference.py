"""Causal depthwise convolution with SiLU: the definition, in plain PyTorch, and what runs on a CPU.

A depthwise filter is `width` numbers a channel, so the convolution is `width` shifted multiply-adds over the whole
tensor: no loop over time, nothing kept for backward but the input and the sum before the activation.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Define :func:`cab_kernels.causal_conv1d_fn`, whose arguments these are, in float32 or better, rounded once."""
    present = [tensor for tensor in (x, weight, bias, initial_states) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in present), torch.float32)
    batch, dim, length = x.shape
    width = weight.shape[1]

    if initial_states is None:
        initial_states = x.new_zeros(batch, dim, width - 1)
    # What came before the first step that is computed: on the left, or mirrored on the right.
    before = initial_states.to(dtype)
    padded = torch.cat([x.to(dtype), before.flip(-1)] if reverse else [before, x.to(dtype)], dim=-1)
    out = x.new_zeros(batch, dim, length, dtype=dtype)
    if bias is not None:
        out = out + bias[:, None].to(dtype)
    for tap in range(width):
        first = width - 1 - tap if reverse else tap
        seen = padded[..., first : first + length]
        if seq_idx is not None:
            seen = seen * _same_sequence(seq_idx, first if reverse else first - (width - 1)).unsqueeze(1)
        out = torch.addcmul(out, weight[:, tap, None].to(dtype), seen)
    if activation is not None:
        out = F.silu(out)
    if seq_idx is not None:
        out = out * (seq_idx >= 0).unsqueeze(1)
    return out.to(x.dtype)


def _same_sequence(seq_idx: Tensor, shift: int) -> Tensor:
    """Whether the position ``shift`` steps later belongs to the same sequence; the outside counts as its edge does."""
    length = seq_idx.shape[1]
    position = torch.arange(length, device=seq_idx.device) + shift
    return seq_idx[:, position.clamp(0, max(length - 1, 0))] == seq_idx if length else seq_idx == seq_idx
