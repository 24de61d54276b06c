"""Q and K out of a packed activation: one pass that norms, rotates, repeats and places heads.

    out[t, head] = rotate(norm(source[index[t], head // repeat]), cos[index[t]], sin[index[t]])

A program owns BLOCK_TOKENS output tokens of a few output heads, one after the other: it reads a head's channels of the
source tokens once and writes them once; cos and sin, which take twice a head's bytes, are read once for all its heads.
Only columns of heads that were asked for are touched, so V never is, nor is anything of size length x length made. A
head is kept as three parts in float32: the first and the second channel of each rotated pair, and the channels that
pass through; a norm's mean runs over all three.

From hidden states, the rows of the weight that belong to Q (or K) are multiplied by cuBLAS into a buffer small enough
for the cache, a few batch entries at a time, and the same kernel reads that buffer.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

from cab_kernels.qk.reference import HeadNorm, Rope

BUFFER_BYTES = 16 * 2**20
BLOCK, BLOCK_OF_MANY = 4096, 2048  # numbers of a head in a program, for one head and for several
MAX_HEADS = 8  # of a program
NORMS = {"rms": 1, "layer": 2}


@triton.jit
def _normed(first, second, rest, mask_pair, mask_rest, head_dim, eps, LAYER: tl.constexpr):
    """The three parts of a head, centred if LAYER, over their root mean square."""
    if LAYER:
        mean = (tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(rest, 1)) / head_dim
        first = tl.where(mask_pair, first - mean[:, None], 0.0)
        second = tl.where(mask_pair, second - mean[:, None], 0.0)
        rest = tl.where(mask_rest, rest - mean[:, None], 0.0)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
    rstd = 1.0 / tl.sqrt_rn(squares / head_dim + eps)
    return first * rstd[:, None], second * rstd[:, None], rest * rstd[:, None]


@triton.jit
def _affine(value, weight_ptr, bias_ptr, channel, mask):
    if weight_ptr is not None:
        value = value * tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        value = value + tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
    return value


@triton.jit
def _extract_heads_kernel(
    source_ptr,
    out_ptr,
    index_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    bias_ptr,
    first_column,
    out_tokens,
    tokens,
    heads_each,
    head_dim,
    half,
    repeat,
    eps,
    stride_source_batch,
    stride_source_token,
    stride_source_column,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_table_batch,
    stride_table_token,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    HAS_REST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """BLOCK_TOKENS output tokens of ``heads_each`` heads; see the module."""
    first_head = tl.program_id(1) * heads_each
    batch = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    there = token < out_tokens
    read = there
    origin = token
    if index_ptr is not None:
        origin = tl.load(index_ptr + token, mask=there, other=-1)
        read = there & (origin >= 0) & (origin < tokens)
    origin = origin.to(tl.int64)
    rows = (source_ptr + batch * stride_source_batch + origin * stride_source_token)[:, None]
    out_rows = (out_ptr + batch * stride_out_batch + token.to(tl.int64) * stride_out_token)[:, None]
    pair = tl.arange(0, BLOCK_HALF)
    first_channel = pair * 2 if INTERLEAVED else pair
    second_channel = first_channel + (1 if INTERLEAVED else half)
    channel = 2 * half + tl.arange(0, BLOCK_REST)
    mask_pair = read[:, None] & (pair < half)[None, :]
    mask_rest = read[:, None] & (channel < head_dim)[None, :]
    both = tl.arange(0, 2 * BLOCK_HALF)
    mask_both = read[:, None] & (both < 2 * half)[None, :]
    if HAS_PAIRS:
        table = (batch * stride_table_batch + origin * stride_table_token)[:, None] + pair[None, :]
        cos = tl.load(cos_ptr + table, mask=mask_pair, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + table, mask=mask_pair, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    for head in range(first_head, first_head + heads_each):
        column = first_column + (head // repeat) * head_dim
        if HAS_PAIRS and INTERLEAVED:
            pairs = tl.load(rows + (column + both)[None, :] * stride_source_column, mask=mask_both, other=0.0)
            first, second = tl.split(tl.reshape(pairs, (BLOCK_TOKENS, BLOCK_HALF, 2)))
        elif HAS_PAIRS:
            first = tl.load(rows + (column + first_channel)[None, :] * stride_source_column, mask=mask_pair, other=0.0)
            second = tl.load(
                rows + (column + second_channel)[None, :] * stride_source_column, mask=mask_pair, other=0.0
            )
        else:
            first = tl.zeros((BLOCK_TOKENS, BLOCK_HALF), tl.float32)
            second = first
        if HAS_REST:
            rest = tl.load(rows + (column + channel)[None, :] * stride_source_column, mask=mask_rest, other=0.0)
        else:
            rest = tl.zeros((BLOCK_TOKENS, BLOCK_REST), tl.float32)
        first, second, rest = first.to(tl.float32), second.to(tl.float32), rest.to(tl.float32)
        if NORM:
            first, second, rest = _normed(first, second, rest, mask_pair, mask_rest, head_dim, eps, NORM == 2)
            first = _affine(first, weight_ptr, bias_ptr, first_channel, pair < half)
            second = _affine(second, weight_ptr, bias_ptr, second_channel, pair < half)
            rest = _affine(rest, weight_ptr, bias_ptr, channel, channel < head_dim)
            # A bias would otherwise show in tokens that the index leaves out; in pairs, cos and sin are 0 there.
            rest = tl.where(read[:, None], rest, 0.0)
        out = out_rows + head * stride_out_head
        if HAS_PAIRS:
            first, second = (first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype)
            if INTERLEAVED:
                pairs = tl.reshape(tl.join(first, second), (BLOCK_TOKENS, 2 * BLOCK_HALF))
                tl.store(out + both[None, :], pairs, mask=there[:, None] & (both < 2 * half)[None, :])
            else:
                mask_out = there[:, None] & (pair < half)[None, :]
                tl.store(out + first_channel[None, :], first, mask=mask_out)
                tl.store(out + second_channel[None, :], second, mask=mask_out)
        if HAS_REST:
            mask_out = there[:, None] & (channel < head_dim)[None, :]
            tl.store(out + channel[None, :], rest.to(dtype), mask=mask_out)


def extract_heads(
    source: torch.Tensor,
    out: torch.Tensor,
    first_column: int,
    repeat: int,
    norm: HeadNorm | None,
    rope: Rope | None,
    token_index: torch.Tensor | None,
) -> None:
    """Fill ``out`` (batch, heads, out_tokens, head_dim), of any strides but the last, which is 1.

    Args:
        source: (batch, tokens, columns).
        first_column: where the first head begins; heads follow one another.
        repeat: output heads for each head of the source.
    """
    moved = norm is None and rope is None
    if moved and repeat == 1:
        out = _regrouped(out)
    batch, heads, out_tokens, head_dim = out.shape
    half = 0 if rope is None else rope.cos.shape[-1]
    if 0 in out.shape:
        return
    block_half = triton.next_power_of_2(max(half, 1))
    block_rest = triton.next_power_of_2(max(head_dim - 2 * half, 1))
    heads_each = 1 if moved else max(count for count in range(1, MAX_HEADS + 1) if heads % count == 0)
    block = BLOCK if heads_each == 1 else BLOCK_OF_MANY
    tokens_per_program = max(1, block // triton.next_power_of_2(head_dim))
    cos, sin = (None, None) if rope is None else (rope.cos.contiguous(), rope.sin.contiguous())
    by_batch = cos is not None and cos.dim() == 3
    with torch.cuda.device(source.device) if source.is_cuda else contextlib.nullcontext():
        _extract_heads_kernel[(triton.cdiv(out_tokens, tokens_per_program), heads // heads_each, batch)](
            source,
            out,
            token_index,
            cos,
            sin,
            None if norm is None or norm.weight is None else norm.weight.contiguous(),
            None if norm is None or norm.bias is None else norm.bias.contiguous(),
            first_column,
            out_tokens,
            source.shape[1],
            heads_each,
            head_dim,
            half,
            repeat,
            0.0 if norm is None else norm.eps,
            *source.stride(),
            *out.stride()[:3],
            cos.stride(0) if by_batch else 0,
            half,
            NORM=0 if norm is None else NORMS[norm.kind],
            INTERLEAVED=rope is not None and rope.interleaved,
            HAS_PAIRS=half > 0,
            HAS_REST=2 * half < head_dim,
            BLOCK_TOKENS=tokens_per_program,
            BLOCK_HALF=block_half,
            BLOCK_REST=block_rest,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _regrouped(out: torch.Tensor) -> torch.Tensor:
    """Where heads lie side by side and nothing is done to them, all their channels as heads of a handy size."""
    batch, heads, tokens, head_dim = out.shape
    if out.stride(1) != head_dim:
        return out
    size = math.gcd(heads * head_dim, 256)
    shape, stride = (batch, heads * head_dim // size, tokens, size), (out.stride(0), size, out.stride(2), 1)
    return out.as_strided(shape, stride)


@torch.library.custom_op("cab_kernels::extract_heads", mutates_args=())
def _extract_heads(
    source: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    first_column: int,
    heads: int,
    head_dim: int,
    repeat: int,
    norm: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    token_index: torch.Tensor | None,
    flat: bool,
) -> torch.Tensor:
    """``heads * repeat`` heads: of the source's columns from ``first_column``, or of the weight's rows from there."""
    out, view = _empty_out(source, heads * repeat, head_dim, token_index, flat)
    how = None
    if norm:
        how = HeadNorm("rms" if norm == NORMS["rms"] else "layer", norm_weight, norm_bias, eps)
    rope = None if cos is None or sin is None else Rope(cos, sin, interleaved)
    if weight is None:
        extract_heads(source, view, first_column, repeat, how, rope, token_index)
        return out
    rows = slice(first_column, first_column + heads * head_dim)
    weight = weight[rows].to(source.dtype)
    bias = None if bias is None else bias[rows].to(source.dtype)
    batch, tokens, _ = source.shape
    together = max(1, BUFFER_BYTES // max(1, tokens * heads * head_dim * source.element_size()))
    with torch.autocast(source.device.type, enabled=False):
        for start in range(0, batch, together):
            part = slice(start, start + together)
            projected = torch.nn.functional.linear(source[part], weight, bias)
            table = rope
            if rope is not None and rope.cos.dim() == 3:
                table = rope._replace(cos=rope.cos[part], sin=rope.sin[part])
            extract_heads(projected, view[part], 0, repeat, how, table, token_index)
    return out


@_extract_heads.register_fake
def _(source, weight, bias, first_column, heads, head_dim, repeat, norm, *rest):
    *_, token_index, flat = rest
    return _empty_out(source, heads * repeat, head_dim, token_index, flat)[0]


def _empty_out(
    source: torch.Tensor, heads: int, head_dim: int, token_index: torch.Tensor | None, flat: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and itself as (batch, heads, tokens, head_dim)."""
    batch, tokens, _ = source.shape
    tokens = tokens if token_index is None else token_index.shape[0]
    if flat:
        out = source.new_empty((batch, tokens, heads * head_dim))
        return out, out.unflatten(2, (heads, head_dim)).transpose(1, 2)
    out = source.new_empty((batch, heads, tokens, head_dim))
    return out, out


def extract_qk_triton(
    source: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    q_norm: HeadNorm | None,
    k_norm: HeadNorm | None,
    rope: Rope | None,
    token_index: torch.Tensor | None,
    repeat_kv: bool,
    out_layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, K) of :func:`cab_kernels.extract_qk`, without a gradient."""
    cos, sin, interleaved = (None, None, False) if rope is None else rope
    index = None if token_index is None else token_index.contiguous()
    results = []
    for which, heads, norm in ((0, num_heads, q_norm), (1, num_kv_heads, k_norm)):
        pair = isinstance(weight, tuple)
        results.append(
            _extract_heads(
                source,
                weight[which] if pair else weight,
                bias[which] if isinstance(bias, tuple) else bias,
                0 if pair else which * num_heads * head_dim,
                heads,
                head_dim,
                num_heads // num_kv_heads if which and repeat_kv else 1,
                0 if norm is None else NORMS[norm.kind],
                None if norm is None else norm.weight,
                None if norm is None else norm.bias,
                0.0 if norm is None else norm.eps,
                cos,
                sin,
                interleaved,
                index,
                out_layout == "flat",
            )
        )
    return results[0], results[1]
