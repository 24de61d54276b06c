"""The definition of Q and K extraction in plain PyTorch; also what a CPU runs."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch


class Rope(NamedTuple):
    """Rotary position embedding of the first ``2 * cos.shape[-1]`` channels of each head; the rest passes through.

    Attributes:
        cos, sin: (tokens, rotary_dim / 2) or (batch, tokens, rotary_dim / 2), by *source* token. Where a model keeps
            both halves (tokens, rotary_dim), pass the first.
        interleaved: pairs are channels (2i, 2i + 1), as in GPT-J; else (i, i + rotary_dim / 2), as in NeoX and Llama.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = False


class HeadNorm(NamedTuple):
    """A norm over the channels of one head, before the rotation.

    Attributes:
        kind: "rms" or "layer".
        weight, bias: (head_dim,), or None.
        eps: added to the mean square or the variance.
    """

    kind: Literal["rms", "layer"]
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6


def extract_qk_ref(
    source: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    weight: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
    token_index: torch.Tensor | None = None,
    repeat_kv: bool = True,
    out_layout: Literal["flat", "heads"] = "flat",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K of one attention layer from its packed qkv or its hidden states; see :func:`extract_qk`.

    Computes in at least float32 and casts once, to the source's dtype.
    """
    compute = torch.promote_types(source.dtype, torch.float32)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    with torch.autocast(source.device.type, enabled=False):
        if weight is None:
            head_dim = source.shape[-1] // (num_heads + 2 * kv_heads)
            q, k, _ = source.split([num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
            q, k = q.to(compute), k.to(compute)
        else:
            hidden = source.to(compute)
            q, k = (hidden @ rows.to(compute).t() for rows in _rows(weight, num_heads, kv_heads))
            if bias is not None:
                bq, bk = _rows(bias, num_heads, kv_heads)
                q, k = q + bq.to(compute), k + bk.to(compute)
        q = _rotated(_normed(q.unflatten(-1, (num_heads, -1)), q_norm), rope)
        k = _rotated(_normed(k.unflatten(-1, (kv_heads, -1)), k_norm), rope)
        if repeat_kv:
            k = k.repeat_interleave(num_heads // kv_heads, dim=2)
        return _placed(q, token_index, out_layout, source.dtype), _placed(k, token_index, out_layout, source.dtype)


def _rows(
    packed: torch.Tensor | tuple[torch.Tensor, torch.Tensor], num_heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a weight or bias that belong to Q and to K."""
    if isinstance(packed, tuple):
        return packed
    head_dim = packed.shape[0] // (num_heads + 2 * kv_heads)
    q, k, _ = packed.split([num_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
    return q, k


def _normed(heads: torch.Tensor, norm: HeadNorm | None) -> torch.Tensor:
    if norm is None:
        return heads
    if norm.kind == "layer":
        heads = heads - heads.mean(-1, keepdim=True)
    heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        heads = heads * norm.weight.to(heads.dtype)
    return heads if norm.bias is None else heads + norm.bias.to(heads.dtype)


def _rotated(heads: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Rotate the pairs of the first channels of (batch, tokens, heads, head_dim)."""
    if rope is None:
        return heads
    half = rope.cos.shape[-1]
    cos, sin = rope.cos.to(heads.dtype).unsqueeze(-2), rope.sin.to(heads.dtype).unsqueeze(-2)
    turned, passed = heads[..., : 2 * half], heads[..., 2 * half :]
    if rope.interleaved:
        first, second = turned.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = turned.unflatten(-1, (2, half)).unbind(-2)
    pair = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1 if rope.interleaved else -2)
    return torch.cat((pair.flatten(-2), passed), dim=-1)


def _placed(heads: torch.Tensor, token_index: torch.Tensor | None, out_layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Move source tokens to their places, then lay (batch, tokens, heads, head_dim) out as asked; cast once."""
    if token_index is not None:
        absent = (token_index < 0).view(-1, 1, 1)
        heads = heads.index_select(1, token_index.clamp(min=0)).masked_fill(absent, 0)
    heads = heads.flatten(2) if out_layout == "flat" else heads.transpose(1, 2)
    return heads.to(dtype).contiguous()
