"""The bridge loss with the hidden layer and the prediction on chip: hidden of up to 128, 16-bit operands.

    z = w1 x + b1        h = silu(z)        r = w2 h + b2 - target        squares = sum r^2
    dw2 = r h^T   db2 = r        dh = w2^T r        dz = dh silu'(z)        dw1 = dz x^T   db1 = dz   dx = w1^T dz

With u = z / 2, which halved w1 and b1 make, silu(z) = u (1 + tanh u), and dz comes out twice as large: powers of two
round nothing.

Gradients are those of ``squares / 2``: the factor ``2 / (tokens * width)`` and the incoming gradient come in backward,
so 16-bit gradients of a small loss do not underflow here. Two kernels, because w2's gradient alone would take up a
multiprocessor's registers; each makes z, h and r again for itself:

* ``_bridge_inner_kernel`` walks over all target channels and owns what lies on x's side: squares, dx, dw1, db1.
* ``_bridge_outer_kernel`` owns a block of target channels: dw2, db2.

A program takes every ``splits``-th block of tokens of one bridge and keeps its weight gradients in registers; they go
to a slice of its own of the kernel's ``partials`` (bridges, splits, numbers), which are summed in a fixed order. The
programs of bridges that share a target are neighbours, so the target is read from memory once.

Both fetch ahead: the outer kernel the next block's x and target, the inner one, which reads w2 again for each block of
tokens, the next two blocks of w2 and of the target. That is why w2 is rounded before.

Tokens are numbered through the batch. r and dz are rounded to x's dtype only as operands of a product; db1 and db2
are products with ones, which cost fewer registers than sums over rows. So do b1 and b2 as products, and because these
have zeros for tokens that do not count, as x and target do, h, r and all that follows are zero there by themselves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cab_kernels.bridge.device_kernels import tanh_like
from cab_kernels.bridge.matching_kernels import (
    Call,
    Partials,
    cdiv,
    gradient_sizes,
    is_hopper,
    is_nvidia_bf16,
    load_target,
    match_tokens,
    matching,
    pick,
    processors,
)


class Tiling(NamedTuple):
    """Tokens a block, warps a program, and stages of its loop: with three, what comes next is fetched ahead."""

    tokens: int
    warps: int
    stages: int


# Both kernels of 96 bridges of 16-128-384, and of 16-128-768, on an H200, Triton 3.6: 3.90 and 6.98 ms; with one stage
# 4.44 and 8.12, and a w2 in float32 besides 4.51 and 8.29; 64 tokens, four warps and three stages 4.10 and 7.17. With
# w2 in shared memory for all tokens, 16-128-192 takes the same 2.41, and 16-128-128 takes 1.87 against 1.95.
INNER = Tiling(128, 8, 3)
# Four warps: two programs fit on a multiprocessor, and one multiplies while the other waits or does all else. Eight
# could hold w2's whole gradient, for 1.6 times fewer instructions a token: 2.88 ms against 2.76, of 96 bridges of
# 16-128-192 on an H100, for with so many registers a multiprocessor has room for one program.
OUTER = Tiling(64, 4, 3)
BLOCK_WIDTH = 64
PARTIAL_BYTES = 64 * 2**20
MAX_HIDDEN = 128  # 256 spills a kilobyte of registers per thread
MAX_WEIGHT = 16384  # BLOCK_STATE * BLOCK_HIDDEN: beyond it, dw1 does not fit into registers


@triton.jit
def _load_bias(bias_ptr, offs, size, scale, dtype: tl.constexpr):
    """A bias as the right operand of a product with ``_present``: rounded, and in the next row what that left."""
    bias = scale * tl.load(bias_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    rounded = bias.to(dtype)
    rest = (bias - rounded.to(tl.float32)).to(dtype)
    row = tl.arange(0, 16)[:, None]
    return tl.where(row == 0, rounded[None, :], tl.where(row == 1, rest[None, :], 0.0)).to(dtype)


@triton.jit
def _present(counted, BLOCK_TOKENS: tl.constexpr, dtype: tl.constexpr):
    """Ones in the rows of tokens that count."""
    return tl.broadcast_to(counted[:, None], (BLOCK_TOKENS, 16)).to(dtype)


@triton.jit
def _load_w2(w2_ptr, cols, offs_hidden, width, hidden_size):
    mask = (cols < width)[:, None] & (offs_hidden < hidden_size)[None, :]
    return tl.load(w2_ptr + cols[:, None] * hidden_size + offs_hidden[None, :], mask=mask, other=0.0)


@triton.jit
def _bridge_inner_kernel(
    xs,
    targets,
    w1s,
    b1s,
    w2s,
    b2s,
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
    STAGES: tl.constexpr,
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
    stack, member = bridge // (len(xs) // len(w1s)), bridge % (len(xs) // len(w1s))
    w1_ptr = pick(w1s, stack) + member * hidden_size * d_state
    w1 = (0.5 * tl.load(w1_ptr + offs_w1, mask=w1_mask, other=0.0)).to(compute)
    b1 = _load_bias(pick(b1s, stack) + member * hidden_size, offs_hidden, hidden_size, 0.5, compute)
    b2_row = pick(b2s, stack) + member * width
    w2_rows = pick(w2s, stack) + member * width * hidden_size
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
        present = _present(counted, BLOCK_TOKENS, compute)
        u = tl.dot(x, tl.trans(w1), tl.dot(present, b1))
        s = 1.0 + tanh_like(u, NVIDIA_BF16)
        hidden = u * s
        # Kept in half the registers: float16 holds it to two bits more than dz will have, or to as many.
        slope = (s + hidden * (2.0 - s)).to(tl.float16 if compute.primitive_bitwidth == 16 else tl.float32)
        hidden = hidden.to(compute)
        target_rows = target_ptr + batch * stride_target_batch + source * stride_target_token
        dh = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
        for first in tl.range(0, width, BLOCK_WIDTH, num_stages=STAGES):
            cols = first + tl.arange(0, BLOCK_WIDTH)
            w2 = _load_w2(w2_rows, cols, offs_hidden, width, hidden_size)
            b2 = _load_bias(b2_row, cols, width, 1.0, compute)
            target = load_target(
                target_rows, counted, cols, mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
                stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
            )  # fmt: skip
            residual = tl.dot(hidden, tl.trans(w2), tl.dot(present, b2)) - target
            squares += tl.sum(residual * residual, 1)
            dh = tl.dot(residual.to(compute), w2, dh)
        if NEEDS_X or NEEDS_W1:
            dz = (dh * slope.to(tl.float32)).to(compute)
            if NEEDS_W1:
                # This order lets the products go out together: the last one is waited for at once.
                db1 = tl.dot(tl.trans(dz), ones, db1)
                dw1 = tl.dot(tl.trans(dz), x, dw1)
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
        tl.store(row + offs_w1, 0.5 * dw1, mask=w1_mask)
        # All columns of db1 are alike.
        tl.store(row + hidden_size * d_state + offs_hidden, 0.5 * tl.max(db1, 1), mask=offs_hidden < hidden_size)


@triton.jit
def _bridge_outer_kernel(
    xs,
    targets,
    w1s,
    b1s,
    w2s,
    b2s,
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
    STAGES: tl.constexpr,
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
    w1_mask = (offs_hidden < hidden_size)[:, None] & (offs_state < d_state)[None, :]
    offs_w1 = offs_hidden[:, None] * d_state + offs_state[None, :]
    stack, member = bridge // (len(xs) // len(w1s)), bridge % (len(xs) // len(w1s))
    w1_ptr = pick(w1s, stack) + member * hidden_size * d_state
    w1 = (0.5 * tl.load(w1_ptr + offs_w1, mask=w1_mask, other=0.0)).to(compute)
    b1 = _load_bias(pick(b1s, stack) + member * hidden_size, offs_hidden, hidden_size, 0.5, compute)
    cols = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    w2 = _load_w2(pick(w2s, stack) + member * width * hidden_size, cols, offs_hidden, width, hidden_size)
    b2 = _load_bias(pick(b2s, stack) + member * width, cols, width, 1.0, compute)
    dw2 = tl.zeros((BLOCK_WIDTH, BLOCK_HIDDEN), tl.float32)
    db2 = tl.zeros((BLOCK_WIDTH, 16), tl.float32)
    ones = tl.full((BLOCK_TOKENS, 16), 1.0, compute)
    for tile in tl.range(split, tl.cdiv(tokens, BLOCK_TOKENS), splits, num_stages=STAGES):
        offs = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        batch, token, source, counted, _ = match_tokens(
            offs, bridge, tokens, length, target_length, mask_ptr, index_ptr, stride_mask_bridge, stride_index_bridge,
            HAS_MASK, HAS_INDEX,
        )  # fmt: skip
        x_rows = x_ptr + batch * stride_x_batch + token * stride_x_token
        x_mask = counted[:, None] & (offs_state < d_state)[None, :]
        x = tl.load(x_rows[:, None] + offs_state[None, :] * stride_x_state, mask=x_mask, other=0.0)
        target_rows = target_ptr + batch * stride_target_batch + source * stride_target_token
        present = _present(counted, BLOCK_TOKENS, compute)
        u = tl.dot(x, tl.trans(w1), tl.dot(present, b1))
        hidden = (u + u * tanh_like(u, NVIDIA_BF16)).to(compute)
        target = load_target(
            target_rows, counted, cols, mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
            stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
        )  # fmt: skip
        residual = tl.dot(hidden, tl.trans(w2), tl.dot(present, b2)) - target
        residual = tl.trans(residual.to(compute))
        # This order: were db2's product last, ptxas would let no two products of this loop overlap.
        db2 = tl.dot(residual, ones, db2)
        dw2 = tl.dot(residual, hidden, dw2)
    row = partials_ptr + (bridge * splits + split).to(tl.int64) * partial_size
    w2_mask = (cols < width)[:, None] & (offs_hidden < hidden_size)[None, :]
    tl.store(row + cols[:, None] * hidden_size + offs_hidden[None, :], dw2, mask=w2_mask)
    tl.store(row + width * hidden_size + cols, tl.max(db2, 1), mask=cols < width)


@functools.lru_cache
def weight_blocks(d_state: int, hidden: int) -> tuple[int, int]:
    """BLOCK_STATE and BLOCK_HIDDEN, the smallest that products of this GPU's kind take."""
    return max(16, triton.next_power_of_2(d_state)), max(64, triton.next_power_of_2(hidden))


def bridge_mse_fused(call: Call, dx: torch.Tensor | None, needs_w1: bool, needs_w2: bool) -> Partials:
    """Launch both kernels; write ``dx`` where it is given."""
    bridges, hidden, d_state, width = call.sizes
    x = call.xs[0]
    block_state, block_hidden = weight_blocks(d_state, hidden)
    columns = cdiv(width, BLOCK_WIDTH)
    inner, outer = INNER, OUTER
    if not is_hopper(x.device):  # for Blackwell, Triton 3.6 cannot compile it; elsewhere the memory may not be there
        inner, outer = inner._replace(stages=1), outer._replace(stages=1)
    size1, size2 = gradient_sizes(call)
    splits1, splits2 = (
        choose_splits(programs, cdiv(call.tokens, tiling.tokens), places(x.device, tiling.warps), most)
        for programs, tiling, most in (
            (bridges, inner, PARTIAL_BYTES // (4 * bridges * size1)),
            (bridges * columns, outer, PARTIAL_BYTES // (4 * bridges * size2)),
        )
    )
    partials = Partials(
        x.new_empty((bridges, splits1), dtype=torch.float32),
        x.new_empty((bridges, splits1), dtype=torch.int32),
        x.new_empty((bridges, splits1, size1), dtype=torch.float32) if needs_w1 else None,
        x.new_empty((bridges, splits2, size2), dtype=torch.float32) if needs_w2 else None,
    )
    arguments = {
        "xs": tuple(call.xs),
        "targets": tuple(call.targets),
        "w1s": tuple(call.w1),
        "b1s": tuple(call.b1),
        "w2s": tuple(stack.to(x.dtype) for stack in call.w2),
        "b2s": tuple(call.b2),
        "d_state": d_state,
        "hidden_size": hidden,
        "stride_x_batch": x.stride(0),
        "stride_x_token": x.stride(1),
        "stride_x_state": x.stride(2),
        "NVIDIA_BF16": is_nvidia_bf16(x),
        "BLOCK_STATE": block_state,
        "BLOCK_HIDDEN": block_hidden,
        "BLOCK_WIDTH": BLOCK_WIDTH,
        "num_stages": 1,
        "enable_fp_fusion": True,
        **matching(call),
    }
    stride_dx = (0, 0, 0, 0) if dx is None else dx.stride()
    _bridge_inner_kernel[(bridges * splits1,)](
        dx_ptr=dx,
        partials_ptr=partials.inner,
        squares_ptr=partials.squares,
        counts_ptr=partials.counts,
        partial_size=size1,
        stride_dx_bridge=stride_dx[0],
        stride_dx_batch=stride_dx[1],
        stride_dx_token=stride_dx[2],
        stride_dx_state=stride_dx[3],
        NEEDS_X=dx is not None,
        NEEDS_W1=needs_w1,
        STAGES=inner.stages,
        BLOCK_TOKENS=inner.tokens,
        num_warps=inner.warps,
        **arguments,
    )
    if needs_w2:
        _bridge_outer_kernel[(bridges * splits2, columns)](
            partials_ptr=partials.outer,
            partial_size=size2,
            STAGES=outer.stages,
            BLOCK_TOKENS=outer.tokens,
            num_warps=outer.warps,
            **arguments,
        )
    return partials


@functools.lru_cache
def choose_splits(bridges: int, tiles: int, places: int, most: int) -> int:
    """Programs per bridge: the fewest whose slowest place on the GPU is within 5 % of the best choice's."""
    most = max(1, min(tiles, most))
    rounds = {splits: cdiv(bridges * splits, places) * cdiv(tiles, splits) for splits in range(1, most + 1)}
    best = min(rounds.values())
    return min(splits for splits, count in rounds.items() if count <= 1.05 * best)


def places(device: torch.device, warps: int) -> int:
    """How many programs run at a time: their registers leave room for eight warps on a multiprocessor."""
    return processors(device) * 8 // warps
