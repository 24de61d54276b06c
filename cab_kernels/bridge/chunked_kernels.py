"""The bridge loss for bridges too large for the chip: products over chunks of tokens, through buffers.

A chunk goes in steps, with buffers Z (step, hidden), H and dZ (chunk, hidden) and R (chunk, width) in the products'
dtype. For each step, and then once for the chunk:

    Z = X w1^T     H = silu(Z + b1)     R = H w2^T + b2 - target, with squares and db2
    dZ = (R w2) silu'(Z + b1), with db1     dX = dZ w1
    dw2 += R^T H     dw1 += dZ^T X

The first two lines are a product of cuBLAS and a pass over it each (``passes_kernels``), or one kernel each
(``product_kernels``); what stands in Z is theirs. All else is cuBLAS.

A step is small where passes follow the products, so that what one launch leaves is still in the L2 cache when the next
one reads it, and else a chunk; a chunk is large, because each one reads and writes the float32 weight gradients, which
accumulate through all chunks; where dZ is kept and x is a matrix, dw1 needs no chunks.

Where dZ is no wider than dX, it is kept in dX's stead in bfloat16, and backward makes dX by a product with the scaled
w1: that saves a pass over dX, and a rounding. float16 could not hold a w1 that is scaled so. Else backward scales dX
where it lies, and to save memory Z lies where dX will, and where a chunk is one step dZ where H did, dw2 being made
before it.

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

from cab_kernels.bridge.matching_kernels import Call, Partials, cdiv, match_tokens, matching, pick, processors
from cab_kernels.bridge.passes_kernels import Passes, launch, multiply
from cab_kernels.bridge.product_kernels import Products, is_described, takes_products

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
    group = min(bridges, BATCHED_BRIDGES) if small else 1
    layer = Products if not small and takes_products(call) else Passes
    one_step = small or layer is Products or x.dtype in ONE_STEP_DTYPES
    dz_in_h = not deferred and one_step
    dz_size = hidden if walks_back and not deferred and not dz_in_h else 0
    z_size = 0 if z_in_kept else hidden
    # Z counts where it is as long as a chunk, but comes on top of the rest where dZ is kept.
    z_counts = small or (layer is Products and not deferred)
    buffers_size = hidden + width + dz_size + (z_size if z_counts else 0)
    chunk, step = choose_chunk(
        tokens,
        group * buffers_size * x.element_size(),
        group * max(hidden, width),
        x.dtype,
        processors(x.device),
        small,
        one_step,
        layer.ROWS,
    )
    parts = cdiv(tokens, layer.ROWS)
    squares = x.new_empty((bridges, parts * cdiv(width, layer.COLUMNS)), dtype=torch.float32)
    counts = torch.empty_like(squares, dtype=torch.int32)
    db1 = x.new_empty((bridges, parts, hidden), dtype=torch.float32) if walks_back else None
    db2 = x.new_empty((bridges, parts, width), dtype=torch.float32)
    sums = Partials(squares, counts, db1, db2)
    sizes = (hidden, width, dz_size)
    z_buffer = x.new_empty(group * step * z_size)
    buffers = [x.new_empty(group * chunk * size) for size in sizes]
    where = matching(call)
    for first in range(0, bridges, group):
        part = slice(first, min(first + group, bridges))
        members = part.stop - part.start
        layers = layer(call, where, part, sums)
        grads = None if totals is None else _Gradients(totals[part], hidden, d_state, width)
        of_part = None if kept is None else kept[part].flatten(1, 2)
        matrix = _x_as_matrix(call, part)
        if matrix is not None and layer is Products and not is_described(matrix[0]):
            matrix = None
        dw1_at_once = needs_w1 and deferred and matrix is not None
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            xc = _copy_x(call, where, part, slice(start, stop)) if matrix is None else matrix[:, start:stop]
            hs, rs, dzs = (
                buffer[: members * (stop - start) * size].view(members, stop - start, size)
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
                layers.hidden(xc[:, now], z, h)
                layers.residual(h, r, start + begin)
                if needs_w2 and dz_in_h:
                    _multiply_tokens(r, h, grads.w2, start > 0, small)
                if not walks_back:
                    continue
                dz = dzs[:, now]
                layers.gradient(r, z, dz, start + begin)
                if dx is not None:
                    multiply(dz, layers.w1, dx)
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
    multiply(dz.flatten(1, 2), w1, dx.flatten(1, 2))


def is_small(hidden: int, d_state: int, width: int) -> bool:
    """Whether one bridge's products leave a GPU idle."""
    return hidden * max(d_state, width) <= BATCHED_WEIGHT


def is_deferred(hidden: int, d_state: int, compute: torch.dtype) -> bool:
    """Whether backward makes dx."""
    return hidden <= d_state and compute in DEFERRED_DTYPES


@functools.lru_cache
def choose_chunk(
    tokens: int,
    token_bytes: int,
    channels: int,
    compute: torch.dtype,
    processors: int,
    small: bool,
    one_step: bool,
    rows: int,
) -> tuple[int, int]:
    """Tokens per chunk and per step: steps whose products' tiles take the fewest rounds on the GPU, as few as may be.

    Args:
        token_bytes: of the buffers that are as long as a chunk.
        channels: of the widest of them.
        small: whether so little is done at a time that launches matter most: as few chunks as may be.
        one_step: whether a chunk is one step.
        rows: a step is a multiple of so many tokens.
    """
    most_chunk = min(
        ONE_STEP_TOKENS if compute in ONE_STEP_DTYPES and not small else CHUNK_TOKENS,
        (SMALL_CHUNK_BYTES if small else CHUNK_BYTES) // token_bytes,
    )
    most = most_chunk if one_step else min(most_chunk, STEP_BYTES // (channels * compute.itemsize))
    unit = TILE[0] if most >= TILE[0] else rows

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
        w1, _, w2, _ = totals.split([hidden * d_state, hidden, width * hidden, width], dim=1)
        self.w1, self.w2 = w1.unflatten(1, (hidden, d_state)), w2.unflatten(1, (width, hidden))


def _multiply_tokens(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool, split: bool) -> None:
    """``left.mT @ right``, a sum over the tokens of each bridge, into ``out`` or added to it; in parts if ``split``."""
    most = 1 << max(0, (SPLIT_BYTES // max(1, out.nbytes)).bit_length() - 1)  # a power of two, as SPLITS is
    parts = math.gcd(left.shape[1], SPLITS, most)
    if not split or parts == 1:
        multiply(left.mT, right, out, add)
        return
    left, right = (value.unflatten(1, (parts, -1)).flatten(0, 1) for value in (left, right))
    products = out.new_empty((len(left), *out.shape[1:]))
    multiply(left.mT, right, products)
    products = products.unflatten(0, (-1, parts))
    if add:
        out += products.sum(1)
    else:
        torch.sum(products, 1, out=out)


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
    launch(
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
