"""A large bridge's products with what follows each of them done before it is stored: for 16 bits on a Hopper GPU.

What ``passes_kernels`` writes, reads and writes again, these write once: a program owns a block of a product, and has
it in registers when it adds the bias, applies silu or subtracts the target. Operands and results move by TMA, through
descriptors, which also cut them off at their ends. Two programs share a multiprocessor, so one multiplies while the
other is at its end. Quarters of a block are stored one after another, which takes fewer registers and less shared
memory. The kernel of silu goes from block to block; the others read a block more at their end, for which the shared
memory of the product is free only if nothing follows.

In Z's place lies silu'(Z + b1), rounded to float16, which holds it to two bits more than bfloat16 would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from cab_kernels.bridge.device_kernels import tanh_like
from cab_kernels.bridge.matching_kernels import (
    Call,
    Partials,
    cdiv,
    is_hopper,
    is_nvidia_bf16,
    load_target,
    match_tokens,
    processors,
)

DTYPES = (torch.bfloat16, torch.float16)
DEPTH, STAGES = 64, 3
PROGRAMS = 2  # that fit on a multiprocessor: their shared memory is just under half of it
ALIGNMENT = 16  # bytes, of what a descriptor begins with and of its rows


@triton.jit
def _product(
    left, right, row, column, depth, RIGHT_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The block of left @ right^T, or with RIGHT_ROWS of left @ right, that begins there; its columns in quarters."""
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in tl.range(0, depth, BLOCK_DEPTH, num_stages=STAGES):
        factor = right.load([start, column]) if RIGHT_ROWS else tl.trans(right.load([column, start]))
        total = tl.dot(left.load([row, start]), factor, total)
    return _quarters(total)


@triton.jit
def _quarters(block):
    left, right = _halves(block)
    return _halves(left) + _halves(right)


@triton.jit
def _halves(block):
    return tl.split(tl.permute(tl.reshape(block, (block.shape[0], 2, block.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _product_silu_kernel(
    x,
    w1,
    slope,
    h,
    b1_ptr,
    chunk,
    d_state,
    hidden_size,
    NVIDIA_BF16: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """h = silu(z + b1) and slope = silu'(z + b1) with z = x w1^T: with u = (z + b1) / 2, h = u (1 + tanh u)."""
    columns = tl.cdiv(hidden_size, BLOCK_COLUMNS)
    for tile in tl.range(tl.program_id(0), tl.cdiv(chunk, BLOCK_ROWS) * columns, tl.num_programs(0), flatten=True):
        row, column = tile // columns * BLOCK_ROWS, tile % columns * BLOCK_COLUMNS
        z = _product(x, w1, row, column, d_state, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, STAGES)
        for j in tl.static_range(4):
            first = column + j * (BLOCK_COLUMNS // 4)
            cols = first + tl.arange(0, BLOCK_COLUMNS // 4)
            u = 0.5 * (z[j] + tl.load(b1_ptr + cols, mask=cols < hidden_size, other=0.0).to(tl.float32)[None, :])
            s = 1.0 + tanh_like(u, NVIDIA_BF16)
            out = u * s
            h.store([row, first], out.to(h.dtype))
            slope.store([row, first], (0.5 * (s + out * (2.0 - s))).to(slope.dtype))


@triton.jit
def _product_residual_kernel(
    h,
    w2,
    r,
    target,
    b2_ptr,
    mean_ptr,
    rstd_ptr,
    mask_ptr,
    index_ptr,
    db2_ptr,
    squares_ptr,
    counts_ptr,
    bridge,
    which,
    first_token,
    chunk,
    hidden_size,
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
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    IS_MATRIX: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """r = h w2^T + b2 - target, with the sums of r over a block's tokens and of r^2, into the bridge's parts.

    Where IS_MATRIX, ``target`` is a descriptor of the chunk's tokens, else a pointer.
    """
    columns = tl.cdiv(width, BLOCK_COLUMNS)
    tile = tl.program_id(0)
    row, column = tile // columns * BLOCK_ROWS, tile % columns * BLOCK_COLUMNS
    part = ((first_token + row) // BLOCK_ROWS).to(tl.int64)
    y = _product(h, w2, row, column, hidden_size, False, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, STAGES)
    if IS_MATRIX:
        wanted = _quarters(target.load([row, column]))
    offs = row + tl.arange(0, BLOCK_ROWS)
    batch, _, source, counted, squares = match_tokens(
        tl.where(offs < chunk, first_token + offs, tokens), bridge, tokens, length, target_length, mask_ptr,
        index_ptr, stride_mask_bridge, stride_index_bridge, HAS_MASK, HAS_INDEX,
    )  # fmt: skip
    for j in tl.static_range(4):
        first = column + j * (BLOCK_COLUMNS // 4)
        cols = first + tl.arange(0, BLOCK_COLUMNS // 4)
        if IS_MATRIX:
            value = wanted[j].to(tl.float32)
        else:
            value = load_target(
                target + batch * stride_target_batch + source * stride_target_token, counted, cols,
                mean_ptr, rstd_ptr, which * stride_mean_target, width, head_dim,
                stride_target_head, stride_target_dim, HAS_HEADS, HAS_STATISTICS,
            )  # fmt: skip
        b2 = tl.load(b2_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
        out = tl.where(counted[:, None] & (cols < width)[None, :], y[j] + b2[None, :] - value, 0.0)
        r.store([row, first], out.to(r.dtype))
        tl.store(db2_ptr + part * width + cols, tl.sum(out, 0), mask=cols < width)
        squares += tl.sum(out * out, 1)
    place = part * columns + tile % columns
    tl.store(squares_ptr + place, tl.sum(squares))
    # Each block of channels sees the same tokens: the first one counts them.
    tl.store(counts_ptr + place, tl.where(column == 0, tl.sum(counted.to(tl.int32)), 0))


@triton.jit
def _product_slope_kernel(
    r,
    w2,
    slope,
    dz,
    db1_ptr,
    first_token,
    width,
    hidden_size,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """dz = (r w2) slope, with its sums over a block's tokens, into the bridge's parts."""
    columns = tl.cdiv(hidden_size, BLOCK_COLUMNS)
    row, column = tl.program_id(0) // columns * BLOCK_ROWS, tl.program_id(0) % columns * BLOCK_COLUMNS
    part = ((first_token + row) // BLOCK_ROWS).to(tl.int64)
    dh = _product(r, w2, row, column, width, True, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH, STAGES)
    slopes = _quarters(slope.load([row, column]))
    for j in tl.static_range(4):
        first = column + j * (BLOCK_COLUMNS // 4)
        cols = first + tl.arange(0, BLOCK_COLUMNS // 4)
        out = dh[j] * slopes[j].to(tl.float32)
        dz.store([row, first], out.to(dz.dtype))
        tl.store(db1_ptr + part * hidden_size + cols, tl.sum(out, 0), mask=cols < hidden_size)


class Products:
    """One bridge of a call, for as many tokens at a time as its buffers hold: as ``Passes``."""

    ROWS, COLUMNS = 128, 128

    def __init__(self, call: Call, where: dict[str, object], part: slice, sums: Partials) -> None:
        dtype, bridge = call.xs[0].dtype, part.start
        self.where, self.bridge = where, bridge
        self.which = bridge // (len(call.xs) // len(call.targets))
        self.w1, w2 = (_as_described(weight[0][part].to(dtype)) for weight in (call.w1, call.w2))
        # As the right operand of each product.
        self.right1, self.right2 = (_descriptor(weight, self.COLUMNS, DEPTH) for weight in (self.w1, w2))
        self.right3 = _descriptor(w2, DEPTH, self.COLUMNS)
        self.b1, self.b2 = call.b1[0][bridge], call.b2[0][bridge]
        self.squares, self.counts, self.db1, self.db2 = (None if value is None else value[bridge] for value in sums)
        self.target = call.targets[self.which]
        plain = not any(where[name] for name in ("HAS_MASK", "HAS_INDEX", "HAS_HEADS", "HAS_STATISTICS"))
        self.matrix = _target_as_matrix(self.target) if plain else None

    def hidden(self, x: torch.Tensor, z: torch.Tensor, h: torch.Tensor) -> None:
        programs = min(self._tiles(h), PROGRAMS * processors(h.device))
        _product_silu_kernel[(programs,)](
            self._left(x), self.right1, self._result(_slopes(z)), self._result(h), self.b1, h.shape[1],
            x.shape[2], h.shape[2], NVIDIA_BF16=is_nvidia_bf16(h), **self._options,
        )  # fmt: skip

    def residual(self, h: torch.Tensor, r: torch.Tensor, first_token: int) -> None:
        target = self.target
        if self.matrix is not None:
            target = self._read(self.matrix[None, first_token : first_token + r.shape[1]])
        _product_residual_kernel[(self._tiles(r),)](
            self._left(h), self.right2, self._result(r), target, b2_ptr=self.b2, db2_ptr=self.db2,
            squares_ptr=self.squares, counts_ptr=self.counts, bridge=self.bridge, which=self.which,
            first_token=first_token, chunk=r.shape[1], hidden_size=h.shape[2], IS_MATRIX=self.matrix is not None,
            **self.where, **self._options,
        )  # fmt: skip

    def gradient(self, r: torch.Tensor, z: torch.Tensor, dz: torch.Tensor, first_token: int) -> None:
        _product_slope_kernel[(self._tiles(dz),)](
            self._left(r), self.right3, self._read(_slopes(z)), self._result(dz),
            self.db1, first_token, r.shape[2], dz.shape[2], **self._options,
        )  # fmt: skip

    def _tiles(self, out: torch.Tensor) -> int:
        return cdiv(out.shape[1], self.ROWS) * cdiv(out.shape[2], self.COLUMNS)

    def _left(self, value: torch.Tensor) -> TensorDescriptor:
        return _descriptor(value, self.ROWS, DEPTH)

    def _read(self, value: torch.Tensor) -> TensorDescriptor:
        return _descriptor(value, self.ROWS, self.COLUMNS)

    def _result(self, value: torch.Tensor) -> TensorDescriptor:
        return _descriptor(value, self.ROWS, self.COLUMNS // 4)

    @property
    def _options(self) -> dict[str, object]:
        return {
            "BLOCK_ROWS": self.ROWS, "BLOCK_COLUMNS": self.COLUMNS, "BLOCK_DEPTH": DEPTH, "STAGES": STAGES,
            "num_warps": 4, "num_stages": STAGES, "enable_fp_fusion": True,
        }  # fmt: skip


def takes_products(call: Call) -> bool:
    """Whether a call's bridges may go through ``Products``: rows of all sizes are whole units of what TMA moves."""
    x = call.xs[0]
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in call.sizes[1:])
    return x.dtype in DTYPES and aligned and is_hopper(x.device)


def is_described(matrix: torch.Tensor) -> bool:
    """Whether TMA takes a matrix as it lies: whole units from row to row, and no row twice."""
    (rows, columns), (stride, unit) = matrix.shape, matrix.stride()
    aligned = not (stride * matrix.element_size() % ALIGNMENT or matrix.data_ptr() % ALIGNMENT)
    return aligned and unit == 1 and stride >= columns and rows > 0


def _as_described(weights: torch.Tensor) -> torch.Tensor:
    """A bridge's weights, (1, rows, columns), copied if they begin where TMA cannot."""
    return weights if is_described(weights[0]) else weights.clone()


def _descriptor(value: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of the only bridge's matrix, in blocks of so many rows and columns."""
    matrix = value[0]
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _slopes(z: torch.Tensor) -> torch.Tensor:
    """The place of z in the dtype that it has there."""
    return z.view(torch.float16) if z.element_size() == 2 else z


def _target_as_matrix(target: torch.Tensor) -> torch.Tensor | None:
    """A target, (batch, length, width) or head by head, as (tokens, width), if TMA can read it so.

    Of 32 bits, a block would take too many registers.
    """
    if target.dim() == 4:
        target = target.transpose(1, 2).flatten(2)
    batch, length, width = target.shape
    if target.stride(2) != 1 or (batch > 1 and target.stride(0) != length * target.stride(1)):
        return None
    matrix = target.as_strided((batch * length, width), (target.stride(1), 1))
    return matrix if target.dtype in DTYPES and is_described(matrix) else None
