"""The bridge loss with the hidden layer and the prediction on chip: hidden of up to 128, 16-bit operands.

    z = w1 x + b1        h = silu(z)        r = w2 h + b2 - target        squares = sum r^2
    dw2 = r h^T   db2 = r        dh = w2^T r        dz = dh silu'(z)        dw1 = dz x^T   db1 = dz   dx = w1^T dz

Gradients are those of ``squares / 2``: the factor ``2 / (tokens * width)`` and the incoming gradient come in backward,
so 16-bit gradients of a small loss do not underflow here. Two kernels, because w2's gradient alone would take up a
multiprocessor's registers; each makes z, h and r again for itself:

* ``_bridge_inner_kernel`` walks over all target channels and owns what lies on x's side: squares, dx, dw1, db1.
* ``_bridge_outer_kernel`` owns BLOCK_WIDTH target channels: dw2, db2.

A program takes every ``splits``-th block of tokens of one bridge and keeps its weight gradients in registers; they go
to a slice of its own of ``partials`` (bridges, splits, :func:`gradient_size`), which is summed in a fixed order. The
programs of bridges that share a target are neighbours, so the target is read from memory once.

Tokens are numbered through the batch. r and dz are rounded to x's dtype only as operands of a product; db1 and db2
are products with ones, which cost fewer registers than sums over rows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cab_kernels.bridge.device_kernels import sigmoid_like

# H100, Triton 3.6, bf16, 96 bridges of 16-128-192 on 25,216 tokens: 1.67 ms for the inner kernel and 1.80 ms for the
# outer; blocks of 64 tokens with 4 warps, two programs at a time, take 2.00 ms for the outer; one kernel for both 4.80.
BLOCK_TOKENS, BLOCK_WIDTH, WARPS = 128, 64, 8
PARTIAL_BYTES = 64 * 2**20
MAX_HIDDEN = 128  # 256 spills a kilobyte of registers per thread
MAX_WEIGHT = 16384  # BLOCK_STATE * BLOCK_HIDDEN: beyond it, dw1 does not fit into registers


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
        source = tl.load(index_ptr + bridge * stride_index_bridge + token, mask=counted, other=-1).to(tl.int64)
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
    """The target's channels ``cols`` of the tokens at ``rows`` in float32, standardised if asked."""
    mask = cols < width
    if HAS_HEADS:
        column = (cols // head_dim).to(tl.int64) * stride_head + (cols % head_dim) * stride_dim
    else:
        column = cols * stride_dim
    target = tl.load(rows[:, None] + column[None, :], mask=counted[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if HAS_STATISTICS:
        mean = tl.load(mean_ptr + offset_mean + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offset_mean + cols, mask=mask, other=0.0).to(tl.float32)
        target = (target - mean[None, :]) * rstd[None, :]
    return target


@triton.jit
def _residual(
    hidden,
    w2,
    target,
    b2_ptr,
    cols,
    counted,
    width,
):
    """w2 h + b2 - target, 0 where a token does not count or a channel does not exist."""
    b2 = tl.load(b2_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    prediction = tl.dot(hidden, tl.trans(w2)) + b2[None, :]
    return tl.where(counted[:, None], prediction - target, 0.0)


@triton.jit
def _load_w2(w2_ptr, cols, offs_hidden, width, hidden_size, dtype: tl.constexpr):
    mask = (cols < width)[:, None] & (offs_hidden < hidden_size)[None, :]
    return tl.load(w2_ptr + cols[:, None] * hidden_size + offs_hidden[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def _bridge_inner_kernel(
    xs,
    targets,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    mean_ptr,
    rstd_ptr,
    mask_ptr,
    index_ptr,
    dx_ptr,
    partials_ptr,
    squares_ptr,
    counts_ptr,
    tokens,
    length,
    target_length,
    d_state,
    hidden_size,
    width,
    head_dim,
    partial_size,
    stride_x_batch,
    stride_x_token,
    stride_x_state,
    stride_target_batch,
    stride_target_head,
    stride_target_token,
    stride_target_dim,
    stride_mean_target,
    stride_dx_bridge,
    stride_dx_batch,
    stride_dx_token,
    stride_dx_state,
    stride_mask_bridge,
    stride_index_bridge,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    NVIDIA_BF16: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_W1: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Squares, count, dx, dw1 and db1 of one bridge over every ``splits``-th block of tokens; see the module."""
    bridge = tl.program_id(0) % len(xs)
    split = tl.program_id(0) // len(xs)
    splits = tl.num_programs(0) // len(xs)
    x_ptr = pick(xs, bridge)
    which = bridge // (len(xs) // len(targets))
    target_ptr = pick(targets, which)
    compute = x_ptr.dtype.element_ty
    offs_state = tl.arange(0, BLOCK_STATE)
    offs_hidden = tl.arange(0, BLOCK_HIDDEN)
    w1_mask = (offs_hidden < hidden_size)[:, None] & (offs_state < d_state)[None, :]
    offs_w1 = offs_hidden[:, None] * d_state + offs_state[None, :]
    w1 = tl.load(w1_ptr + bridge * hidden_size * d_state + offs_w1, mask=w1_mask, other=0.0).to(compute)
    b1_ptrs = b1_ptr + bridge * hidden_size + offs_hidden
    ones = tl.full((BLOCK_TOKENS, 16), 1.0, compute)
    dw1 = tl.zeros((BLOCK_HIDDEN, BLOCK_STATE), tl.float32)
    db1 = tl.zeros((BLOCK_HIDDEN, 16), tl.float32)
    squares = tl.zeros((BLOCK_TOKENS,), tl.float32)
    count = tl.zeros((BLOCK_TOKENS,), tl.int32)
    for tile in range(split, tl.cdiv(tokens, BLOCK_TOKENS), splits):
        offs = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        batch, token, source, counted, penalty = match_tokens(
            offs, bridge, tokens, length, target_length, mask_ptr, index_ptr, stride_mask_bridge, stride_index_bridge,
            HAS_MASK, HAS_INDEX,
        )  # fmt: skip
        count += counted.to(tl.int32)
        squares += penalty
        x_rows = x_ptr + batch * stride_x_batch + token * stride_x_token
        x_mask = counted[:, None] & (offs_state < d_state)[None, :]
        x = tl.load(x_rows[:, None] + offs_state[None, :] * stride_x_state, mask=x_mask, other=0.0)
        b1 = tl.load(b1_ptrs, mask=offs_hidden < hidden_size, other=0.0).to(tl.float32)
        z = tl.dot(x, tl.trans(w1)) + b1[None, :]
        hidden = (z * sigmoid_like(z, NVIDIA_BF16)).to(compute)
        target_rows = target_ptr + batch * stride_target_batch + source * stride_target_token
        dh = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
        for first in range(0, width, BLOCK_WIDTH):
            cols = first + tl.arange(0, BLOCK_WIDTH)
            w2 = _load_w2(w2_ptr + bridge * width * hidden_size, cols, offs_hidden, width, hidden_size, compute)
            target = load_target(
                target_rows, counted, cols, mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
                stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
            )  # fmt: skip
            residual = _residual(hidden, w2, target, b2_ptr + bridge * width, cols, counted, width)
            squares += tl.sum(residual * residual, 1)
            if NEEDS_X or NEEDS_W1:
                dh = tl.dot(residual.to(compute), w2, dh)
        if NEEDS_X or NEEDS_W1:
            # z is made once more rather than kept: the cache modifier makes these other loads to the compiler, which
            # would otherwise keep all of z in registers across the loop.
            x = tl.load(
                x_rows[:, None] + offs_state[None, :] * stride_x_state, mask=x_mask, other=0.0, cache_modifier=".cg"
            )
            b1 = tl.load(b1_ptrs, mask=offs_hidden < hidden_size, other=0.0, cache_modifier=".cg").to(tl.float32)
            z = tl.dot(x, tl.trans(w1)) + b1[None, :]
            s = sigmoid_like(z, NVIDIA_BF16)
            dz = (dh * s * (1.0 + z * (1.0 - s))).to(compute)
            if NEEDS_W1:
                dw1 = tl.dot(tl.trans(dz), x, dw1)
                db1 = tl.dot(tl.trans(dz), ones, db1)
            if NEEDS_X:
                dx = tl.dot(dz, w1).to(compute)
                dx_rows = dx_ptr + bridge * stride_dx_bridge + batch * stride_dx_batch + token * stride_dx_token
                dx_mask = (offs < tokens)[:, None] & (offs_state < d_state)[None, :]
                tl.store(dx_rows[:, None] + offs_state[None, :] * stride_dx_state, dx, mask=dx_mask)
    program = bridge * splits + split
    tl.store(squares_ptr + program, tl.sum(squares))
    tl.store(counts_ptr + program, tl.sum(count))
    if NEEDS_W1:
        row = partials_ptr + program.to(tl.int64) * partial_size
        tl.store(row + offs_w1, dw1, mask=w1_mask)
        # All columns of db1 are alike.
        tl.store(row + hidden_size * d_state + offs_hidden, tl.max(db1, 1), mask=offs_hidden < hidden_size)


@triton.jit
def _bridge_outer_kernel(
    xs,
    targets,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    mean_ptr,
    rstd_ptr,
    mask_ptr,
    index_ptr,
    partials_ptr,
    tokens,
    length,
    target_length,
    d_state,
    hidden_size,
    width,
    head_dim,
    partial_size,
    stride_x_batch,
    stride_x_token,
    stride_x_state,
    stride_target_batch,
    stride_target_head,
    stride_target_token,
    stride_target_dim,
    stride_mean_target,
    stride_mask_bridge,
    stride_index_bridge,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    NVIDIA_BF16: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """dw2 and db2 of BLOCK_WIDTH target channels of one bridge over every ``splits``-th block of tokens."""
    bridge = tl.program_id(0) % len(xs)
    split = tl.program_id(0) // len(xs)
    splits = tl.num_programs(0) // len(xs)
    x_ptr = pick(xs, bridge)
    which = bridge // (len(xs) // len(targets))
    target_ptr = pick(targets, which)
    compute = x_ptr.dtype.element_ty
    offs_state = tl.arange(0, BLOCK_STATE)
    offs_hidden = tl.arange(0, BLOCK_HIDDEN)
    cols = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    w1_mask = (offs_hidden < hidden_size)[:, None] & (offs_state < d_state)[None, :]
    offs_w1 = offs_hidden[:, None] * d_state + offs_state[None, :]
    w1 = tl.load(w1_ptr + bridge * hidden_size * d_state + offs_w1, mask=w1_mask, other=0.0).to(compute)
    b1_ptrs = b1_ptr + bridge * hidden_size + offs_hidden
    w2 = _load_w2(w2_ptr + bridge * width * hidden_size, cols, offs_hidden, width, hidden_size, compute)
    ones = tl.full((BLOCK_TOKENS, 16), 1.0, compute)
    dw2 = tl.zeros((BLOCK_WIDTH, BLOCK_HIDDEN), tl.float32)
    db2 = tl.zeros((BLOCK_WIDTH, 16), tl.float32)
    for tile in range(split, tl.cdiv(tokens, BLOCK_TOKENS), splits):
        offs = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        batch, token, source, counted, _ = match_tokens(
            offs, bridge, tokens, length, target_length, mask_ptr, index_ptr, stride_mask_bridge, stride_index_bridge,
            HAS_MASK, HAS_INDEX,
        )  # fmt: skip
        x_rows = x_ptr + batch * stride_x_batch + token * stride_x_token
        x_mask = counted[:, None] & (offs_state < d_state)[None, :]
        x = tl.load(x_rows[:, None] + offs_state[None, :] * stride_x_state, mask=x_mask, other=0.0)
        target = load_target(
            target_ptr + batch * stride_target_batch + source * stride_target_token, counted, cols,
            mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
            stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
        )  # fmt: skip
        b1 = tl.load(b1_ptrs, mask=offs_hidden < hidden_size, other=0.0).to(tl.float32)
        z = tl.dot(x, tl.trans(w1)) + b1[None, :]
        hidden = (z * sigmoid_like(z, NVIDIA_BF16)).to(compute)
        residual = _residual(hidden, w2, target, b2_ptr + bridge * width, cols, counted, width)
        residual = tl.trans(residual.to(compute))
        dw2 = tl.dot(residual, hidden, dw2)
        db2 = tl.dot(residual, ones, db2)
    row = partials_ptr + (bridge * splits + split).to(tl.int64) * partial_size + hidden_size * (d_state + 1)
    w2_mask = (cols < width)[:, None] & (offs_hidden < hidden_size)[None, :]
    tl.store(row + cols[:, None] * hidden_size + offs_hidden[None, :], dw2, mask=w2_mask)
    tl.store(row + width * hidden_size + cols, tl.max(db2, 1), mask=cols < width)


class Call(NamedTuple):
    """One call of the op: xs (batch, length, d_state) of one dtype and one set of strides, and so the targets."""

    xs: list[torch.Tensor]
    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor
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
        return (*self.w1.shape, self.w2.shape[1])


def cdiv(size: int, block: int) -> int:
    """How many blocks; Triton's own costs microseconds on the host."""
    return -(-size // block)


@functools.lru_cache
def weight_blocks(d_state: int, hidden: int) -> tuple[int, int]:
    """BLOCK_STATE and BLOCK_HIDDEN, the smallest that products of this GPU's kind take."""
    return max(16, triton.next_power_of_2(d_state)), max(64, triton.next_power_of_2(hidden))


def gradient_size(call: Call) -> int:
    """How many numbers one bridge's weight gradients have, laid out dw1, db1, dw2, db2."""
    _, hidden, d_state, width = call.sizes
    return hidden * (d_state + 1) + width * (hidden + 1)


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
        "width": call.w2.shape[1],
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


def bridge_mse_fused(
    call: Call, dx: torch.Tensor | None, needs_w1: bool, needs_w2: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Launch both kernels; write ``dx`` where it is given.

    Returns:
        squares (bridges, splits), counts (bridges, splits), and the partial weight gradients (bridges, splits,
        ``gradient_size``), or None where no weight needs one.
    """
    bridges, hidden, d_state, width = call.sizes
    x = call.xs[0]
    block_state, block_hidden = weight_blocks(d_state, hidden)
    most = PARTIAL_BYTES // (4 * bridges * gradient_size(call))
    splits = choose_splits(bridges, cdiv(call.tokens, BLOCK_TOKENS), processors(x.device), most)
    squares = x.new_empty((bridges, splits), dtype=torch.float32)
    counts = x.new_empty((bridges, splits), dtype=torch.int32)
    partials = None
    if needs_w1 or needs_w2:
        partials = x.new_empty((bridges, splits, gradient_size(call)), dtype=torch.float32)
    arguments = {
        "xs": tuple(call.xs),
        "targets": tuple(call.targets),
        "w1_ptr": call.w1,
        "b1_ptr": call.b1,
        "w2_ptr": call.w2,
        "b2_ptr": call.b2,
        "partials_ptr": partials,
        "d_state": d_state,
        "hidden_size": hidden,
        "partial_size": gradient_size(call),
        "stride_x_batch": x.stride(0),
        "stride_x_token": x.stride(1),
        "stride_x_state": x.stride(2),
        "NVIDIA_BF16": x.is_cuda and torch.version.hip is None and x.dtype == torch.bfloat16,
        "BLOCK_TOKENS": BLOCK_TOKENS,
        "BLOCK_STATE": block_state,
        "BLOCK_HIDDEN": block_hidden,
        "BLOCK_WIDTH": BLOCK_WIDTH,
        "num_warps": WARPS,
        "enable_fp_fusion": True,
        **matching(call),
    }
    stride_dx = (0, 0, 0, 0) if dx is None else dx.stride()
    _bridge_inner_kernel[(bridges * splits,)](
        dx_ptr=dx,
        squares_ptr=squares,
        counts_ptr=counts,
        stride_dx_bridge=stride_dx[0],
        stride_dx_batch=stride_dx[1],
        stride_dx_token=stride_dx[2],
        stride_dx_state=stride_dx[3],
        NEEDS_X=dx is not None,
        NEEDS_W1=needs_w1,
        num_stages=1,
        **arguments,
    )
    if needs_w2:
        _bridge_outer_kernel[(bridges * splits, cdiv(width, BLOCK_WIDTH))](
            num_stages=_outer_stages(x.device), **arguments
        )
    return squares, counts, partials


@functools.lru_cache
def choose_splits(bridges: int, tiles: int, places: int, most: int) -> int:
    """Programs per bridge: the fewest whose slowest place on the GPU is within 5 % of the best choice's."""
    most = max(1, min(tiles, most))
    rounds = {splits: cdiv(bridges * splits, places) * cdiv(tiles, splits) for splits in range(1, most + 1)}
    best = min(rounds.values())
    return min(splits for splits, count in rounds.items() if count <= 1.05 * best)


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a few where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def _outer_stages(device: torch.device) -> int:
    """Prefetching the next block saves a tenth on a Hopper GPU; for Blackwell, Triton 3.6 cannot compile it."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return 2 if hopper and torch.version.hip is None else 1
