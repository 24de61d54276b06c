"""The bridge loss after its products: what the programs of a call left is added up, and in backward scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from cab_kernels.bridge.matching_kernels import Call, Partials, cdiv, gradient_sizes

BLOCK = 4096
# Numbers and parts of them that a program sums at a time: many numbers of few parts, and few of many.
REDUCE_WIDE, REDUCE_LONG, REDUCE_MOST = (128, 32), (32, 128), 128


@triton.jit
def _sum(
    partials_ptr, totals_ptr, size, splits, stride_total, first, bridge, BLOCK: tl.constexpr, BLOCK_SPLITS: tl.constexpr
):
    """Sum the block of partial gradients that is this program's, if it is one; return where the next ones begin."""
    block = tl.program_id(0) - first
    if (block >= 0) & (block < tl.cdiv(size, BLOCK)):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK_SPLITS, BLOCK), tl.float32)
        for start in range(0, splits, BLOCK_SPLITS):
            split = start + tl.arange(0, BLOCK_SPLITS)
            rows = partials_ptr + (bridge * splits + split).to(tl.int64) * size
            mask = (split < splits)[:, None] & (offs < size)[None, :]
            total += tl.load(rows[:, None] + offs[None, :], mask=mask, other=0.0)
        tl.store(totals_ptr + bridge.to(tl.int64) * stride_total + offs, tl.sum(total, 0), mask=offs < size)
    return first + tl.cdiv(size, BLOCK)


@triton.jit
def _bridge_reduce_kernel(
    inner_ptr,
    outer_ptr,
    squares_ptr,
    counts_ptr,
    totals_ptr,
    loss_ptr,
    factor_ptr,
    inner_size,
    outer_size,
    inner_splits,
    outer_splits,
    inner_end,
    outer_end,
    parts,
    width,
    BLOCK: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Sum one block of a bridge's partial gradients over the splits, in order; the first program makes the loss.

    Programs are numbered through the inner and the outer gradients, which end at ``inner_end`` and ``outer_end`` of a
    bridge's row of ``totals``.
    """
    bridge = tl.program_id(1)
    first = 1
    if inner_ptr is not None:
        inner_totals = totals_ptr + inner_end - inner_size
        first = _sum(inner_ptr, inner_totals, inner_size, inner_splits, outer_end, first, bridge, BLOCK, BLOCK_SPLITS)
    if outer_ptr is not None:
        outer_totals = totals_ptr + outer_end - outer_size
        first = _sum(outer_ptr, outer_totals, outer_size, outer_splits, outer_end, first, bridge, BLOCK, BLOCK_SPLITS)
    if tl.program_id(0) == 0:
        squares = tl.zeros((BLOCK_PARTS,), tl.float64)
        counts = tl.zeros((BLOCK_PARTS,), tl.int64)
        for start in range(0, parts, BLOCK_PARTS):
            part = start + tl.arange(0, BLOCK_PARTS)
            squares += tl.load(squares_ptr + bridge * parts + part, mask=part < parts, other=0.0).to(tl.float64)
            counts += tl.load(counts_ptr + bridge * parts + part, mask=part < parts, other=0).to(tl.int64)
        terms = tl.maximum(tl.sum(counts), 1).to(tl.float64) * width
        tl.store(loss_ptr + bridge, (tl.sum(squares) / terms).to(tl.float32))
        tl.store(factor_ptr + bridge, (2.0 / terms).to(tl.float32))


@triton.jit
def _scale(source_ptr, out_ptr, size, stride_source, first, bridge, factor, BLOCK: tl.constexpr):
    """Scale the block of a gradient that is this program's, if it is one; return where the next gradient begins."""
    block = tl.program_id(0) - first
    if (block >= 0) & (block < tl.cdiv(size, BLOCK)):
        offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source_ptr + bridge * stride_source + offs, mask=offs < size, other=0.0).to(tl.float32)
        tl.store(out_ptr + bridge * size + offs, (value * factor).to(out_ptr.dtype.element_ty), mask=offs < size)
    return first + tl.cdiv(size, BLOCK)


@triton.jit
def _bridge_scale_kernel(
    incoming_ptr,
    factor_ptr,
    x_ptr,
    totals_ptr,
    out_x_ptr,
    out_w1_ptr,
    out_b1_ptr,
    out_w2_ptr,
    out_b2_ptr,
    size_x,
    size_w1,
    size_b1,
    size_w2,
    size_b2,
    BLOCK: tl.constexpr,
):
    """Multiply one block of one gradient of a bridge by its factor; programs are numbered through all gradients.

    ``x_ptr`` holds dx or, where backward makes dx by a product, w1.
    """
    bridge = tl.program_id(1).to(tl.int64)
    factor = tl.load(incoming_ptr + bridge).to(tl.float32) * tl.load(factor_ptr + bridge)
    stride = size_w1 + size_b1 + size_w2 + size_b2
    first = 0
    if out_x_ptr is not None:
        first = _scale(x_ptr, out_x_ptr, size_x, size_x, first, bridge, factor, BLOCK)
    if out_w1_ptr is not None:
        first = _scale(totals_ptr, out_w1_ptr, size_w1, stride, first, bridge, factor, BLOCK)
    if out_b1_ptr is not None:
        first = _scale(totals_ptr + size_w1, out_b1_ptr, size_b1, stride, first, bridge, factor, BLOCK)
    if out_w2_ptr is not None:
        first = _scale(totals_ptr + size_w1 + size_b1, out_w2_ptr, size_w2, stride, first, bridge, factor, BLOCK)
    if out_b2_ptr is not None:
        before = size_w1 + size_b1 + size_w2
        first = _scale(totals_ptr + before, out_b2_ptr, size_b2, stride, first, bridge, factor, BLOCK)


def add_up(call: Call, partials: Partials, totals: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and factors of all bridges; where there are partial gradients, their sums into ``totals`` too."""
    bridges, _, _, width = call.sizes
    squares, counts, inner, outer = partials
    loss, factor = (squares.new_empty((bridges,)) for _ in range(2))
    sizes = [0 if part is None else part.shape[2] for part in (inner, outer)]
    splits = [0 if part is None else part.shape[1] for part in (inner, outer)]
    size1, size2 = gradient_sizes(call)
    block, block_splits = REDUCE_WIDE if max(splits) <= REDUCE_MOST else REDUCE_LONG
    _bridge_reduce_kernel[(sum(cdiv(size, block) for size in sizes) + 1, bridges)](
        inner,
        outer,
        squares,
        counts,
        totals,
        loss,
        factor,
        *sizes,
        *splits,
        size1,
        size1 + size2,
        squares.shape[1],
        width,
        BLOCK=block,
        BLOCK_SPLITS=block_splits,
        BLOCK_PARTS=1024,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return loss, factor


def scale(
    incoming: torch.Tensor,
    factor: torch.Tensor,
    source: torch.Tensor,
    totals: torch.Tensor,
    outs: Sequence[torch.Tensor | None],
    sizes: Sequence[int],
) -> None:
    """Fill those of ``outs`` that are there, of so many numbers a bridge: the first from ``source``, all else from
    ``totals``, times a bridge's ``incoming`` and ``factor``.
    """
    blocks = sum(cdiv(size, BLOCK) for size, out in zip(sizes, outs, strict=True) if out is not None)
    if blocks > 0:
        _bridge_scale_kernel[(blocks, len(factor))](
            incoming.contiguous(),
            factor,
            source,
            totals,
            *outs,
            *sizes,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
