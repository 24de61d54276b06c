"""The bridge loss for bridges too large for the chip: cuBLAS products over chunks of tokens, with Triton between them.

A chunk goes in steps, with buffers Z (step, hidden), H and dZ (chunk, hidden) and R (chunk, width) in the products'
dtype. For each step, and then once for the chunk:

    Z = X w1^T     H = silu(Z + b1)     R = H w2^T, then R + b2 - target in place, with squares and db2
    dZ = R w2, then times silu'(Z + b1) in place, with db1     dX = dZ w1
    dw2 += R^T H     dw1 += dZ^T X

A step is small, so that what one launch leaves is still in the L2 cache when the next one reads it; a chunk is large,
because each one reads and writes the float32 weight gradients, which accumulate through all chunks; where dZ is kept
and x is a matrix, dw1 needs no chunks.

Where dZ is no wider than dX, it is kept in dX's stead in bfloat16, and backward makes dX by a product with the scaled
w1: that saves a pass over dX, and a rounding. float16 could not hold a w1 that is scaled so. float32 saves the memory
instead: backward scales dX where it lies, Z lies where dX will, and dZ where H did, dw2 being made before it.

Small bridges go several at a time through batched products; cuBLAS gives each matrix of a batch few multiprocessors, so
the tokens of their weight gradients are split as well. As in the fused kernels, gradients are those of ``squares / 2``,
and sums over programs go through partial buffers.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from cab_kernels.bridge.device_kernels import tanh_like
from cab_kernels.bridge.matching_kernels import (
    Call,
    Partials,
    cdiv,
    is_nvidia_bf16,
    load_target,
    match_tokens,
    matching,
    pick,
    processors,
)

CHUNK_TOKENS = 17408  # dw's read-modify-write costs 2 % of its products then, and 6 % in chunks a third as large
DEFERRED_DTYPES = (torch.bfloat16,)
ONE_STEP_DTYPES, ONE_STEP_TOKENS = (torch.float32,), 5632  # products so slow that it costs less than 1 % even so
CHUNK_BYTES, SMALL_CHUNK_BYTES = 64 * 2**20, 128 * 2**20
STEP_BYTES = 24 * 2**20  # of the widest buffer
TILE = (128, 256)  # what cuBLAS gives a multiprocessor at a time
BATCHED_WEIGHT = 512 * 512  # hidden * max(d_state, width)
BATCHED_BRIDGES = 8
# Of a chunk's tokens, for the weight gradients of small bridges. Chosen by arithmetic, not timed against other splits.
SPLITS, SPLIT_BYTES = 32, 16 * 2**20
BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


@triton.jit
def _chunk_x_kernel(
    xs,
    out_ptr,
    mask_ptr,
    index_ptr,
    first_bridge,
    first_token,
    chunk,
    tokens,
    length,
    target_length,
    d_state,
    stride_x_batch,
    stride_x_token,
    stride_x_state,
    stride_mask_bridge,
    stride_index_bridge,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy a block of one bridge's x into the contiguous chunk, with zeros for the tokens that do not count."""
    slot = tl.program_id(2)
    bridge = first_bridge + slot
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    batch, token, _, counted, _ = match_tokens(
        first_token + row, bridge, tokens, length, target_length, mask_ptr, index_ptr, stride_mask_bridge,
        stride_index_bridge, HAS_MASK, HAS_INDEX,
    )  # fmt: skip
    rows = pick(xs, bridge) + batch * stride_x_batch + token * stride_x_token
    mask = (row < chunk)[:, None] & (cols < d_state)[None, :]
    x = tl.load(rows[:, None] + cols[None, :] * stride_x_state, mask=mask & counted[:, None], other=0.0)
    out_rows = out_ptr + (slot.to(tl.int64) * chunk + row) * d_state
    tl.store(out_rows[:, None] + cols[None, :], x, mask=mask)


@triton.jit
def _chunk_silu_kernel(
    z_ptr,
    b1_ptr,
    h_ptr,
    chunk,
    hidden_size,
    stride_z_slot,
    stride_h_slot,
    NVIDIA_BF16: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """h = silu(z + b1) of one block, which is u (1 + tanh u) with u = (z + b1) / 2."""
    slot = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs = (row.to(tl.int64) * hidden_size)[:, None] + cols[None, :]
    mask = (row < chunk)[:, None] & (cols < hidden_size)[None, :]
    b1 = tl.load(b1_ptr + slot * hidden_size + cols, mask=cols < hidden_size, other=0.0).to(tl.float32)
    u = 0.5 * (tl.load(z_ptr + slot * stride_z_slot + offs, mask=mask, other=0.0).to(tl.float32) + b1[None, :])
    h = u + u * tanh_like(u, NVIDIA_BF16)
    tl.store(h_ptr + slot * stride_h_slot + offs, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _chunk_residual_kernel(
    targets,
    r_ptr,
    b2_ptr,
    mean_ptr,
    rstd_ptr,
    mask_ptr,
    index_ptr,
    db2_ptr,
    squares_ptr,
    counts_ptr,
    first_bridge,
    first_token,
    chunk,
    bridges,
    tokens,
    length,
    target_length,
    width,
    head_dim,
    stride_target_batch,
    stride_target_head,
    stride_target_token,
    stride_target_dim,
    stride_mean_target,
    stride_mask_bridge,
    stride_index_bridge,
    stride_r_slot,
    parts,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """R + b2 - target of one block, in place, with the sums of r over its tokens and of r^2."""
    slot = tl.program_id(2)
    bridge = first_bridge + slot
    which = bridge // (bridges // len(targets))
    target_ptr = pick(targets, which)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b2 = tl.load(b2_ptr + bridge * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    batch, _, source, counted, penalty = match_tokens(
        tl.where(row < chunk, first_token + row, tokens), bridge, tokens, length, target_length, mask_ptr,
        index_ptr, stride_mask_bridge, stride_index_bridge, HAS_MASK, HAS_INDEX,
    )  # fmt: skip
    target = load_target(
        target_ptr + batch * stride_target_batch + source * stride_target_token, counted, cols,
        mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
        stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
    )  # fmt: skip
    r_ptrs = r_ptr + slot.to(tl.int64) * stride_r_slot + (row.to(tl.int64) * width)[:, None] + cols[None, :]
    mask = (row < chunk)[:, None] & (cols < width)[None, :]
    r = tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32) + b2[None, :] - target
    r = tl.where(counted[:, None] & (cols < width)[None, :], r, 0.0)
    tl.store(r_ptrs, r.to(r_ptr.dtype.element_ty), mask=mask)
    part = bridge.to(tl.int64) * parts + first_token // BLOCK_ROWS + tl.program_id(0)
    tl.store(db2_ptr + part * width + cols, tl.sum(r, 0), mask=cols < width)
    part = part * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + part, tl.sum(r * r) + tl.sum(penalty))
    # Each block of channels sees the same tokens: the first one counts them.
    tl.store(counts_ptr + part, tl.where(tl.program_id(1) == 0, tl.sum(counted.to(tl.int32)), 0))


@triton.jit
def _chunk_slope_kernel(
    z_ptr,
    b1_ptr,
    dz_ptr,
    db1_ptr,
    first_bridge,
    first_token,
    chunk,
    hidden_size,
    stride_z_slot,
    stride_dz_slot,
    parts,
    NVIDIA_BF16: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The hidden layer's gradient times silu'(z + b1) of one block, in place, with its sums over tokens."""
    slot = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs = (row.to(tl.int64) * hidden_size)[:, None] + cols[None, :]
    mask = (row < chunk)[:, None] & (cols < hidden_size)[None, :]
    dz_ptrs = dz_ptr + slot * stride_dz_slot + offs
    b1 = tl.load(b1_ptr + slot * hidden_size + cols, mask=cols < hidden_size, other=0.0).to(tl.float32)
    u = 0.5 * (tl.load(z_ptr + slot * stride_z_slot + offs, mask=mask, other=0.0).to(tl.float32) + b1[None, :])
    s = 1.0 + tanh_like(u, NVIDIA_BF16)
    dz = tl.load(dz_ptrs, mask=mask, other=0.0).to(tl.float32) * (0.5 * (s + u * s * (2.0 - s)))
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    part = (first_bridge + slot) * parts + first_token // BLOCK_ROWS + tl.program_id(0)
    tl.store(db1_ptr + part * hidden_size + cols, tl.sum(dz, 0), mask=cols < hidden_size)


def bridge_mse_chunked(
    call: Call, kept: torch.Tensor | None, totals: torch.Tensor | None, needs_w1: bool, needs_w2: bool
) -> Partials:
    """Write ``kept``, (bridges, batch, length, ...), contiguous, and the products of ``totals`` where given.

    ``kept`` is dx or, where it ``is_deferred``, dz.
    """
    bridges, hidden, d_state, width = call.sizes
    x, tokens = call.xs[0], call.tokens
    walks_back, small = needs_w1 or kept is not None, is_small(hidden, d_state, width)
    deferred = kept is not None and is_deferred(hidden, d_state, x.dtype)
    z_in_kept = kept is not None and not deferred and not small and hidden <= d_state
    dz_in_h = not deferred and is_one_step(x.dtype, small)
    group = min(bridges, BATCHED_BRIDGES) if small else 1
    dz_size = hidden if walks_back and not deferred and not dz_in_h else 0
    buffers_size = hidden + width + dz_size + (hidden if small else 0)
    chunk, step = choose_chunk(
        tokens,
        group * buffers_size * x.element_size(),
        group * max(hidden, width),
        x.dtype,
        processors(x.device),
        small,
    )
    parts = cdiv(tokens, BLOCK_ROWS)
    squares = x.new_empty((bridges, parts * cdiv(width, BLOCK_COLUMNS)), dtype=torch.float32)
    counts = torch.empty_like(squares, dtype=torch.int32)
    db1 = x.new_empty((bridges, parts, hidden), dtype=torch.float32) if walks_back else None
    db2 = x.new_empty((bridges, parts, width), dtype=torch.float32)
    sizes = (hidden, width, dz_size)
    z_buffer = x.new_empty(0 if z_in_kept else group * step * hidden)
    buffers = [x.new_empty(group * chunk * size) for size in sizes]
    where = matching(call)
    nvidia_bf16 = is_nvidia_bf16(x)
    for first in range(0, bridges, group):
        part = slice(first, min(first + group, bridges))
        w1, w2, b1 = call.w1[part].to(x.dtype), call.w2[part].to(x.dtype), call.b1[part]
        grads = None if totals is None else _Gradients(totals[part], hidden, d_state, width)
        of_part = None if kept is None else kept[part].flatten(1, 2)
        matrix = _x_as_matrix(call, part)
        dw1_at_once = needs_w1 and deferred and matrix is not None
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            xc = _copy_x(call, where, part, slice(start, stop)) if matrix is None else matrix[:, start:stop]
            hs, rs, dzs = (
                buffer[: len(w1) * (stop - start) * size].view(len(w1), stop - start, size)
                for buffer, size in zip(buffers, sizes, strict=True)
            )
            if deferred:
                dzs = of_part[:, start:stop]
            elif dz_in_h:
                dzs = hs
            for begin in range(0, stop - start, step):
                now = slice(begin, min(begin + step, stop - start))
                h, r = hs[:, now], rs[:, now]
                dx = None if of_part is None or deferred else of_part[:, start + now.start : start + now.stop]
                z = (dx.flatten() if z_in_kept else z_buffer)[: h.numel()].view(h.shape)
                _multiply(xc[:, now], w1.mT, z)
                _launch(
                    _chunk_silu_kernel, h, z_ptr=z, b1_ptr=b1, h_ptr=h, hidden_size=hidden,
                    stride_z_slot=z.stride(0), stride_h_slot=h.stride(0), NVIDIA_BF16=nvidia_bf16,
                )  # fmt: skip
                _multiply(h, w2.mT, r)
                _launch(
                    _chunk_residual_kernel, r, targets=tuple(call.targets), r_ptr=r, b2_ptr=call.b2, db2_ptr=db2,
                    squares_ptr=squares, counts_ptr=counts, first_bridge=first, first_token=start + begin,
                    bridges=bridges, stride_r_slot=r.stride(0), parts=parts, **where,
                )  # fmt: skip
                if needs_w2 and dz_in_h:
                    _multiply_tokens(r, h, grads.w2, start > 0, small)
                if not walks_back:
                    continue
                dz = dzs[:, now]
                _multiply(r, w2, dz)
                _launch(
                    _chunk_slope_kernel, dz, z_ptr=z, b1_ptr=b1, dz_ptr=dz, db1_ptr=db1, first_bridge=first,
                    first_token=start + begin, hidden_size=hidden, stride_z_slot=z.stride(0),
                    stride_dz_slot=dz.stride(0), parts=parts, NVIDIA_BF16=nvidia_bf16,
                )  # fmt: skip
                if dx is not None:
                    _multiply(dz, w1, dx)
            if needs_w2 and not dz_in_h:
                _multiply_tokens(rs, hs, grads.w2, start > 0, small)
            if needs_w1 and not dw1_at_once:
                _multiply_tokens(dzs, xc, grads.w1, start > 0, small)
        if dw1_at_once and tokens > 0:
            _multiply_tokens(of_part, matrix, grads.w1, False, small)
    if totals is not None and tokens == 0:
        totals.zero_()
    return Partials(squares, counts, db1 if needs_w1 else None, db2 if needs_w2 else None)


def make_deferred_dx(dz: torch.Tensor, w1: torch.Tensor, dx: torch.Tensor) -> None:
    """Write dx (bridges, batch, length, d_state) from what ``bridge_mse_chunked`` kept; the factors are in w1."""
    _multiply(dz.flatten(1, 2), w1, dx.flatten(1, 2))


def is_small(hidden: int, d_state: int, width: int) -> bool:
    """Whether one bridge's products leave a GPU idle."""
    return hidden * max(d_state, width) <= BATCHED_WEIGHT


def is_deferred(hidden: int, d_state: int, compute: torch.dtype) -> bool:
    """Whether backward makes dx."""
    return hidden <= d_state and compute in DEFERRED_DTYPES


def is_one_step(compute: torch.dtype, small: bool) -> bool:
    """Whether a chunk is one step."""
    return small or compute in ONE_STEP_DTYPES


@functools.lru_cache
def choose_chunk(
    tokens: int, token_bytes: int, channels: int, compute: torch.dtype, processors: int, small: bool
) -> tuple[int, int]:
    """Tokens per chunk and per step: steps whose products' tiles take the fewest rounds on the GPU, as few as may be.

    Args:
        token_bytes: of the buffers that are as long as a chunk.
        channels: of the widest of them.
        small: whether so little is done at a time that launches matter most: as few chunks as may be.
    """
    one_step = is_one_step(compute, small)
    most_chunk = min(
        ONE_STEP_TOKENS if one_step and not small else CHUNK_TOKENS,
        (SMALL_CHUNK_BYTES if small else CHUNK_BYTES) // token_bytes,
    )
    most = most_chunk if one_step else min(most_chunk, STEP_BYTES // (channels * compute.itemsize))
    unit = TILE[0] if most >= TILE[0] else BLOCK_ROWS

    def rounds_of(step: int) -> int:
        return cdiv(cdiv(step, TILE[0]) * cdiv(channels, TILE[1]), processors)

    def cost(step: int) -> tuple[int, int]:
        steps, rest = divmod(tokens, step)
        rounds = steps * rounds_of(step) + rounds_of(rest)
        return (cdiv(tokens, step), rounds) if small else (rounds, cdiv(tokens, step))

    step = min(range(unit, max(most, unit) + 1, unit), key=cost)
    return (step if one_step else step * max(1, most_chunk // step)), step


class _Gradients:
    """The rows of ``totals`` as weight gradients."""

    def __init__(self, totals: torch.Tensor, hidden: int, d_state: int, width: int) -> None:
        w1, self.b1, w2, self.b2 = totals.split([hidden * d_state, hidden, width * hidden, width], dim=1)
        self.w1, self.w2 = w1.unflatten(1, (hidden, d_state)), w2.unflatten(1, (width, hidden))


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """``left @ right`` of each bridge into ``out``, or added to it, in out's dtype."""
    to = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    if len(out) == 1:
        # One product: as matrices, because cuBLAS splits long sums over multiprocessors only there.
        left, right, out = left[0], right[0], out[0]
    multiply, multiply_add = (torch.mm, torch.addmm) if out.dim() == 2 else (torch.bmm, torch.baddbmm)
    if add:
        multiply_add(out, left, right, **to, out=out)
    else:
        multiply(left, right, **to, out=out)


def _multiply_tokens(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool, split: bool) -> None:
    """``left.mT @ right``, a sum over the tokens of each bridge, into ``out`` or added to it; in parts if ``split``."""
    most = 1 << max(0, (SPLIT_BYTES // max(1, out.nbytes)).bit_length() - 1)  # a power of two, as SPLITS is
    parts = math.gcd(left.shape[1], SPLITS, most)
    if not split or parts == 1:
        _multiply(left.mT, right, out, add)
        return
    left, right = (value.unflatten(1, (parts, -1)).flatten(0, 1) for value in (left, right))
    products = out.new_empty((len(left), *out.shape[1:]))
    _multiply(left.mT, right, products)
    products = products.unflatten(0, (-1, parts))
    if add:
        out += products.sum(1)
    else:
        torch.sum(products, 1, out=out)


def _launch(kernel, value: torch.Tensor, **arguments: object) -> None:
    """Launch over the blocks of ``value`` (bridges, tokens, channels)."""
    bridges, chunk, channels = value.shape
    kernel[(cdiv(chunk, BLOCK_ROWS), cdiv(channels, BLOCK_COLUMNS), bridges)](
        chunk=chunk,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
        **arguments,
    )


def _x_as_matrix(call: Call, part: slice) -> torch.Tensor | None:
    """Some bridges' x as (1, tokens, d_state), if it is a matrix in memory and all of it counts."""
    x = call.xs[part.start]
    batch, length, d_state = x.shape
    matrix = x.stride(2) == 1 and (batch == 1 or x.stride(0) == length * x.stride(1))
    if matrix and part.stop - part.start == 1 and call.mask is None and call.token_index is None:
        return x.as_strided((1, call.tokens, d_state), (0, x.stride(1), 1))
    return None


def _copy_x(call: Call, where: dict[str, object], part: slice, chunk: slice) -> torch.Tensor:
    """A chunk of some bridges' x, with zeros for the tokens that do not count."""
    x = call.xs[part.start]
    bridges, tokens, d_state = part.stop - part.start, chunk.stop - chunk.start, x.shape[2]
    out = x.new_empty((bridges, tokens, d_state))
    names = ("mask_ptr", "index_ptr", "tokens", "length", "target_length")
    names += ("stride_mask_bridge", "stride_index_bridge", "HAS_MASK", "HAS_INDEX")
    _launch(
        _chunk_x_kernel,
        out,
        xs=tuple(call.xs),
        out_ptr=out,
        first_bridge=part.start,
        first_token=chunk.start,
        d_state=d_state,
        stride_x_batch=x.stride(0),
        stride_x_token=x.stride(1),
        stride_x_state=x.stride(2),
        **{name: where[name] for name in names},
    )
    return out
