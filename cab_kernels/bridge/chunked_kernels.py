"""The bridge loss for bridges too large for the chip: cuBLAS products over chunks of tokens, with Triton between them.

For each chunk, with buffers Z, H (chunk, hidden) and R (chunk, width) in the products' dtype:

    Z = X w1^T        H = silu(Z + b1)        R = H w2^T, then R + b2 - target in place, with squares and db2
    dw2 += R^T H      H = R w2, then times silu'(Z + b1) in place, with db1         dw1 += H^T X        dX = H w1

Weight gradients accumulate in float32 through all chunks. Small bridges go several at a time through batched products;
cuBLAS gives each matrix of a batch few multiprocessors, so the tokens of their weight gradients are split as well.
As in the fused kernels, gradients are those of ``squares / 2``, and sums over programs go through partial buffers.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from cab_kernels.bridge.device_kernels import sigmoid
from cab_kernels.bridge.matching_kernels import Call, cdiv, load_target, match_tokens, matching, pick, processors

CHUNK_TOKENS = 12288  # dw's read-modify-write then costs 3 % of its products
CHUNK_BYTES = 128 * 2**20
TILE = (128, 256)  # what cuBLAS gives a multiprocessor at a time
BATCHED_WEIGHT = 512 * 512  # hidden * max(d_state, width)
BATCHED_BRIDGES = 8
# Of a chunk's tokens, for the weight gradients of small bridges. Chosen by arithmetic, not timed against other splits.
SPLITS, SPLIT_BYTES = 32, 16 * 2**20
BLOCK_ROWS, BLOCK_COLUMNS, ROWS = 32, 128, 64  # a program of a reduction walks over ROWS tokens


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
def _chunk_silu_kernel(z_ptr, b1_ptr, h_ptr, chunk, hidden_size, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """h = silu(z + b1) of one block."""
    slot = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offs = ((slot.to(tl.int64) * chunk + row) * hidden_size)[:, None] + cols[None, :]
    mask = (row < chunk)[:, None] & (cols < hidden_size)[None, :]
    b1 = tl.load(b1_ptr + slot * hidden_size + cols, mask=cols < hidden_size, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) + b1[None, :]
    tl.store(h_ptr + offs, (z * sigmoid(z)).to(h_ptr.dtype.element_ty), mask=mask)


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
    stride_db2_bridge,
    stride_squares_bridge,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """R + b2 - target over ROWS tokens and BLOCK_COLUMNS channels, in place, with the sums of r and of r^2."""
    slot = tl.program_id(2)
    bridge = first_bridge + slot
    which = bridge // (bridges // len(targets))
    target_ptr = pick(targets, which)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b2 = tl.load(b2_ptr + bridge * width + cols, mask=cols < width, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    penalties = tl.zeros((BLOCK_ROWS,), tl.float32)
    count = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, BLOCK_ROWS)
        batch, _, source, counted, penalty = match_tokens(
            tl.where(row < chunk, first_token + row, tokens), bridge, tokens, length, target_length, mask_ptr,
            index_ptr, stride_mask_bridge, stride_index_bridge, HAS_MASK, HAS_INDEX,
        )  # fmt: skip
        count += counted.to(tl.int32)
        penalties += penalty
        target = load_target(
            target_ptr + batch * stride_target_batch + source * stride_target_token, counted, cols,
            mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
            stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
        )  # fmt: skip
        r_ptrs = r_ptr + ((slot.to(tl.int64) * chunk + row) * width)[:, None] + cols[None, :]
        mask = (row < chunk)[:, None] & (cols < width)[None, :]
        r = tl.load(r_ptrs, mask=mask, other=0.0).to(tl.float32) + b2[None, :] - target
        r = tl.where(counted[:, None] & (cols < width)[None, :], r, 0.0)
        sums += r
        squares += r * r
        tl.store(r_ptrs, r.to(r_ptr.dtype.element_ty), mask=mask)
    part = tl.program_id(0)
    tl.store(db2_ptr + slot * stride_db2_bridge + part * width + cols, tl.sum(sums, 0), mask=cols < width)
    part = part * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + slot * stride_squares_bridge + part, tl.sum(squares) + tl.sum(penalties))
    # Each block of channels sees the same tokens: the first one counts them.
    counted_here = tl.where(tl.program_id(1) == 0, tl.sum(count), 0)
    tl.store(counts_ptr + slot * stride_squares_bridge + part, counted_here)


@triton.jit
def _chunk_slope_kernel(
    z_ptr,
    b1_ptr,
    dh_ptr,
    db1_ptr,
    chunk,
    hidden_size,
    stride_db1_bridge,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dh times silu'(z + b1) over ROWS tokens of BLOCK_COLUMNS channels, in place, with its sums over tokens."""
    slot = tl.program_id(2)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    b1 = tl.load(b1_ptr + slot * hidden_size + cols, mask=cols < hidden_size, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, ROWS, BLOCK_ROWS):
        row = tl.program_id(0) * ROWS + start + tl.arange(0, BLOCK_ROWS)
        offs = ((slot.to(tl.int64) * chunk + row) * hidden_size)[:, None] + cols[None, :]
        mask = (row < chunk)[:, None] & (cols < hidden_size)[None, :]
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32) + b1[None, :]
        s = sigmoid(z)
        dz = tl.load(dh_ptr + offs, mask=mask, other=0.0).to(tl.float32) * s * (1.0 + z * (1.0 - s))
        sums += dz
        tl.store(dh_ptr + offs, dz.to(dh_ptr.dtype.element_ty), mask=mask)
    db1_row = db1_ptr + slot * stride_db1_bridge + tl.program_id(0) * hidden_size
    tl.store(db1_row + cols, tl.sum(sums, 0), mask=cols < hidden_size)


def bridge_mse_chunked(
    call: Call, dx: torch.Tensor | None, totals: torch.Tensor | None, needs_w1: bool, needs_w2: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write ``dx`` (bridges, batch, length, d_state), contiguous, and ``totals`` where given.

    Returns:
        squares and counts, (bridges, parts) each.
    """
    bridges, hidden, d_state, width = call.sizes
    x, tokens = call.xs[0], call.tokens
    small = is_small(hidden, d_state, width)
    group = min(bridges, BATCHED_BRIDGES) if small else 1
    token_bytes = group * (2 * hidden + width) * x.element_size()
    chunk = choose_chunk(tokens, token_bytes, group * max(hidden, width), processors(x.device))
    chunks, parts = cdiv(tokens, chunk), cdiv(chunk, ROWS)
    # Zeros, because a shorter last chunk leaves parts unwritten.
    squares = x.new_zeros((bridges, chunks, parts * cdiv(width, BLOCK_COLUMNS)), dtype=torch.float32)
    counts = torch.zeros_like(squares, dtype=torch.int32)
    db1 = x.new_zeros((group, chunks, parts, hidden), dtype=torch.float32)
    db2 = x.new_zeros((group, chunks, parts, width), dtype=torch.float32)
    buffers = [x.new_empty(group * chunk * size) for size in (hidden, hidden, width)]
    where = matching(call)
    for first in range(0, bridges, group):
        part = slice(first, min(first + group, bridges))
        grads = None if totals is None else _Gradients(totals[part], hidden, d_state, width)
        w1, w2 = call.w1[part].to(x.dtype), call.w2[part].to(x.dtype)
        for number, start in enumerate(range(0, tokens, chunk)):
            stop = min(start + chunk, tokens)
            z, h, r = (
                buffer[: len(w1) * (stop - start) * size].view(len(w1), stop - start, size)
                for buffer, size in zip(buffers, (hidden, hidden, width), strict=True)
            )
            xc = _chunk_x(call, where, part, slice(start, stop))
            _multiply(xc, w1.mT, z)
            _launch(_chunk_silu_kernel, h, BLOCK_ROWS, z_ptr=z, b1_ptr=call.b1[first:], h_ptr=h, hidden_size=hidden)
            _multiply(h, w2.mT, r)
            _launch(
                _chunk_residual_kernel, r, ROWS, targets=tuple(call.targets), r_ptr=r, b2_ptr=call.b2,
                db2_ptr=db2[:, number], squares_ptr=squares[part, number], counts_ptr=counts[part, number],
                first_bridge=first, first_token=start, bridges=bridges, stride_db2_bridge=db2.stride(0),
                stride_squares_bridge=squares.stride(0), ROWS=ROWS, **where,
            )  # fmt: skip
            if needs_w2:
                _multiply_tokens(r, h, grads.w2, number > 0, small)
            if not needs_w1 and dx is None:
                continue
            _multiply(r, w2, h)
            _launch(
                _chunk_slope_kernel, h, ROWS, z_ptr=z, b1_ptr=call.b1[first:], dh_ptr=h,
                db1_ptr=db1[:, number], hidden_size=hidden, stride_db1_bridge=db1.stride(0), ROWS=ROWS,
            )  # fmt: skip
            if needs_w1:
                _multiply_tokens(h, xc, grads.w1, number > 0, small)
            if dx is not None:
                _multiply(h, w1, dx[part].view(len(w1), tokens, d_state)[:, start:stop])
        if grads is not None:
            torch.sum(db1[: len(w1)].flatten(1, 2), 1, out=grads.b1)
            torch.sum(db2[: len(w1)].flatten(1, 2), 1, out=grads.b2)
    if totals is not None and tokens == 0:
        totals.zero_()
    return squares.flatten(1), counts.flatten(1)


def is_small(hidden: int, d_state: int, width: int) -> bool:
    """Whether one bridge's products leave a GPU idle."""
    return hidden * max(d_state, width) <= BATCHED_WEIGHT


@functools.lru_cache
def choose_chunk(tokens: int, token_bytes: int, channels: int, processors: int) -> int:
    """Tokens per chunk: as many as the limits allow, so that its products' tiles come to full rounds on the GPU."""
    most = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // token_bytes))
    if tokens <= most:
        return max(1, tokens)
    round_of_tiles = processors * TILE[0] // cdiv(channels, TILE[1])
    if most > round_of_tiles:
        most -= most % round_of_tiles
    return most if most < TILE[0] else most - most % TILE[0]


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


def _launch(kernel, value: torch.Tensor, rows: int, **arguments: object) -> None:
    """Launch over blocks of ``rows`` tokens and BLOCK_COLUMNS channels of ``value`` (bridges, chunk, channels)."""
    bridges, chunk, channels = value.shape
    kernel[(cdiv(chunk, rows), cdiv(channels, BLOCK_COLUMNS), bridges)](
        chunk=chunk,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
        **arguments,
    )


def _chunk_x(call: Call, where: dict[str, object], part: slice, chunk: slice) -> torch.Tensor:
    """A chunk of some bridges' x: itself where it is a matrix in memory and all of it counts, else a copy."""
    x = call.xs[part.start]
    batch, length, d_state = x.shape
    bridges, tokens = part.stop - part.start, chunk.stop - chunk.start
    matrix = x.stride(2) == 1 and (batch == 1 or x.stride(0) == length * x.stride(1))
    if matrix and bridges == 1 and call.mask is None and call.token_index is None:
        return x.as_strided((1, call.tokens, d_state), (0, x.stride(1), 1))[:, chunk]
    out = x.new_empty((bridges, tokens, d_state))
    names = ("mask_ptr", "index_ptr", "tokens", "length", "target_length")
    names += ("stride_mask_bridge", "stride_index_bridge", "HAS_MASK", "HAS_INDEX")
    _launch(
        _chunk_x_kernel,
        out,
        BLOCK_ROWS,
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
