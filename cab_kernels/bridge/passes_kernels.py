"""A large bridge's products by cuBLAS, and a pass of Triton over what each of them leaves."""

from __future__ import annotations

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
    pick,
)

BLOCK_ROWS, BLOCK_COLUMNS = 64, 64


@triton.jit
def _pass_silu_kernel(
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
def _pass_residual_kernel(
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
    b2 = tl.load(b2_ptr + slot * width + cols, mask=cols < width, other=0.0).to(tl.float32)
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
def _pass_slope_kernel(
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


class Passes:
    """Some bridges of a call, for as many tokens at a time as their buffers hold.

    Every buffer is (bridges, tokens, ...) and is for the tokens from ``first_token`` on, a multiple of ``ROWS``, of the
    call; ``where`` says which target each meets. ``sums`` gets a part for each block of ``ROWS`` tokens.
    """

    ROWS, COLUMNS = BLOCK_ROWS, BLOCK_COLUMNS

    def __init__(self, call: Call, where: dict[str, object], part: slice, sums: Partials) -> None:
        dtype = call.xs[0].dtype
        self.call, self.where, self.sums, self.first_bridge = call, where, sums, part.start
        self.w1, self.w2 = call.w1[0][part].to(dtype), call.w2[0][part].to(dtype)
        self.b1, self.b2 = call.b1[0][part], call.b2[0][part]

    def hidden(self, x: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> None:
        """Z = X w1^T, H = silu(Z + b1)"""
        multiply(x, self.w1.mT, z)
        launch(
            _pass_silu_kernel, h, z_ptr=z, b1_ptr=self.b1, h_ptr=h, hidden_size=h.shape[2], stride_z_slot=z.stride(0),
            stride_h_slot=h.stride(0), NVIDIA_BF16=is_nvidia_bf16(h),
        )  # fmt: skip

    def residual(self, h: torch.Tensor, r: torch.Tensor, first_token: int) -> None:
        """R = H w2^T + b2 - target, with squares and db2"""
        multiply(h, self.w2.mT, r)
        launch(
            _pass_residual_kernel, r, targets=tuple(self.call.targets), r_ptr=r, b2_ptr=self.b2,
            db2_ptr=self.sums.outer, squares_ptr=self.sums.squares, counts_ptr=self.sums.counts,
            first_bridge=self.first_bridge, first_token=first_token, bridges=len(self.call.xs),
            stride_r_slot=r.stride(0), parts=self.sums.outer.shape[1], **self.where,
        )  # fmt: skip

    def gradient(self, r: torch.Tensor, z: torch.Tensor, dz: torch.Tensor, first_token: int) -> None:
        """dZ = (R w2) silu'(Z + b1), with db1"""
        multiply(r, self.w2, dz)
        launch(
            _pass_slope_kernel, dz, z_ptr=z, b1_ptr=self.b1, dz_ptr=dz, db1_ptr=self.sums.inner,
            first_bridge=self.first_bridge, first_token=first_token, hidden_size=dz.shape[2],
            stride_z_slot=z.stride(0), stride_dz_slot=dz.stride(0), parts=self.sums.inner.shape[1],
            NVIDIA_BF16=is_nvidia_bf16(dz),
        )  # fmt: skip


def launch(kernel, value: torch.Tensor, **arguments: object) -> None:
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


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
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
