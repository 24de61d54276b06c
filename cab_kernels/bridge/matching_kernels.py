"""What the fused and the chunked kernels of the bridge loss share: a call, and which target each token meets where."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def pick(pointers, index):
    """The element of a tuple of pointers at a run-time index."""
    picked = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        picked = tl.where(index == i, pointers[i], picked)
    return picked


@triton.jit
def match_tokens(
    offs,
    bridge,
    tokens,
    length,
    target_length,
    mask_ptr,
    index_ptr,
    stride_mask_bridge,
    stride_index_bridge,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """Where student tokens lie and what they meet: batch, token, target token, whether they count, a penalty.

    The penalty is NaN for tokens matched beyond the target's end, which do not count, and 0 for all others.
    """
    counted = offs < tokens
    batch = (offs // length).to(tl.int64)
    token = (offs % length).to(tl.int64)
    source = token
    penalty = tl.zeros_like(offs).to(tl.float32)
    if HAS_MASK:
        counted = counted & (tl.load(mask_ptr + bridge * stride_mask_bridge + offs, mask=counted, other=0) != 0)
    if HAS_INDEX:
        # In halves of 32 bits: Triton would fetch anything wider ahead, and what it points to only a stage later.
        halves = (index_ptr + bridge * stride_index_bridge + token).to(tl.pointer_type(tl.int16), bitcast=True)
        low = tl.load(halves, mask=counted, other=-1).to(tl.uint16).to(tl.int64)
        source = tl.load(halves + 1, mask=counted, other=-1).to(tl.int64) * 65536 + low
        penalty = tl.where(source < target_length, 0.0, float("nan"))
        counted = counted & (source >= 0) & (source < target_length)
    return batch, token, source, counted, penalty


@triton.jit
def load_target(
    rows,
    counted,
    cols,
    mean_ptr,
    rstd_ptr,
    offset_mean,
    width,
    head_dim,
    stride_head,
    stride_dim,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
):
    """Channels ``cols`` of the target's tokens at ``rows`` in float32, standardised if asked; 0 where not counted."""
    mask = cols < width
    if HAS_HEADS:
        column = (cols // head_dim).to(tl.int64) * stride_head + (cols % head_dim) * stride_dim
    else:
        column = cols * stride_dim
    target = tl.load(rows[:, None] + column[None, :], mask=counted[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if HAS_STATISTICS:
        mean = tl.load(mean_ptr + offset_mean + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offset_mean + cols, mask=mask, other=0.0).to(tl.float32)
        target = tl.where(counted[:, None], (target - mean[None, :]) * rstd[None, :], 0.0)
    return target


class Call(NamedTuple):
    """One call of the op: xs (batch, length, d_state) of one dtype and one set of strides, and so the targets.

    The weights are stacks of as many bridges each; of bridges that do not stay on chip, a call has one stack.
    """

    xs: list[torch.Tensor]
    w1: list[torch.Tensor]
    b1: list[torch.Tensor]
    w2: list[torch.Tensor]
    b2: list[torch.Tensor]
    targets: list[torch.Tensor]
    mask: torch.Tensor | None
    token_index: torch.Tensor | None
    target_mean: torch.Tensor | None
    target_rstd: torch.Tensor | None

    @property
    def tokens(self) -> int:
        return self.xs[0].shape[0] * self.xs[0].shape[1]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """bridges, hidden, d_state, width"""
        return (len(self.xs), *self.w1[0].shape[1:], self.w2[0].shape[1])


class Partials(NamedTuple):
    """What the programs of a call leave to be summed, (bridges, programs, ...) each; None where nobody needs it.

    Squares and counts hold one number a program; inner and outer a program's gradients of w1 and b1, and of w2 and b2,
    or of b1 and of b2 alone.
    """

    squares: torch.Tensor
    counts: torch.Tensor
    inner: torch.Tensor | None
    outer: torch.Tensor | None


def cdiv(size: int, block: int) -> int:
    """How many blocks; Triton's own costs microseconds on the host."""
    return -(-size // block)


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a few where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def is_nvidia_bf16(x: torch.Tensor) -> bool:
    """Whether ``tanh_like`` may be the fast one."""
    return x.is_cuda and torch.version.hip is None and x.dtype == torch.bfloat16


@functools.lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a Hopper GPU; what runs on one is interpreted, too."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def gradient_sizes(call: Call) -> tuple[int, int]:
    """How many numbers the gradients of w1 and b1, and of w2 and b2, of one bridge have, in this order."""
    _, hidden, d_state, width = call.sizes
    return hidden * (d_state + 1), width * (hidden + 1)


def matching(call: Call) -> dict[str, object]:
    """The kernels' arguments that say which target each token meets, and where it lies."""
    target = call.targets[0]
    heads = target.dim() == 4
    batch, head, token, dim = target.stride() if heads else (target.stride(0), 0, *target.stride()[1:])
    if heads and head == target.shape[3] * dim:
        heads = False  # head by head is channel by channel here
    mask, index, mean = call.mask, call.token_index, call.target_mean
    return {
        "mask_ptr": mask,
        "index_ptr": index,
        "mean_ptr": mean,
        "rstd_ptr": call.target_rstd,
        "tokens": call.tokens,
        "length": call.xs[0].shape[1],
        "target_length": target.shape[-2],
        "width": call.w2[0].shape[1],
        "head_dim": target.shape[-1],
        "stride_target_batch": batch,
        "stride_target_head": head,
        "stride_target_token": token,
        "stride_target_dim": dim,
        "stride_mean_target": mean.stride(0) if mean is not None and mean.dim() == 2 else 0,
        "stride_mask_bridge": mask.stride(0) if mask is not None and mask.dim() == 3 else 0,
        "stride_index_bridge": index.stride(0) if index is not None and index.dim() == 2 else 0,
        "HAS_MASK": mask is not None,
        "HAS_INDEX": index is not None,
        "HAS_HEADS": heads,
        "HAS_STATISTICS": mean is not None,
    }
