"""Q and K of an attention layer, without V and without the attention matrix."""

from __future__ import annotations

from typing import Literal

import torch

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.qk.reference import HeadNorm, Rope, extract_qk_ref

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def extract_qk(
    source: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    weight: Rows | None = None,
    bias: Rows | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    rope: Rope | None = None,
    token_index: torch.Tensor | None = None,
    repeat_kv: bool = True,
    out_layout: Literal["flat", "heads"] = "flat",
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K as a teacher's attention would use them, in new tensors of the source's dtype.

    In this order: projection (from hidden states), head norm, rotation, repetition of K's heads, placement of tokens.
    All in float32 at least, rounded once. V's channels are never read, the source is never written, and nothing of
    size length x length exists.

    Args:
        source: (batch, tokens, (num_heads + 2 * num_kv_heads) * head_dim), a packed ``q | k | v`` activation, where
            ``weight`` is None; else hidden states (batch, tokens, d_model). Any strides.
        num_heads: heads of Q.
        num_kv_heads: heads of K and V; None for as many as Q has.
        weight: the packed ``q | k | v`` weight ((num_heads + 2 * num_kv_heads) * head_dim, d_model), whose V rows are
            left alone, or a pair (Q's, K's). GPT-2 keeps the transpose: pass ``weight.t()``.
        bias: likewise; only with ``weight``.
        q_norm, k_norm: a :class:`HeadNorm` over each head's channels.
        rope: a :class:`Rope`; its rows are source tokens.
        token_index: optional integers (out_tokens,): output token t is source token ``token_index[t]``, or zeros
            where that is -1. Moves and drops prefix tokens and reverses.
        repeat_kv: give K ``num_heads`` heads, each repeated; False keeps K narrow.
        out_layout: "flat" for (batch, tokens, heads * head_dim), "heads" for (batch, heads, tokens, head_dim).
        backend: None, "triton" or "reference".

    Returns:
        (q, k), contiguous. The reference is differentiable; the Triton backend serves frozen teachers and gives no
        gradient.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: sizes or devices disagree, the backend cannot run, or it is Triton and a gradient is asked for.

    Source: arXiv:2510.19266, section 3 (the bridge's targets); RoPE arXiv:2104.09864.
    """
    check = ArgumentCheck("extract_qk")
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    check.true(num_heads > 0, "num_heads of at least 1", num_heads)
    check.true(
        kv_heads > 0 and num_heads % kv_heads == 0, f"num_kv_heads to divide num_heads = {num_heads}", num_kv_heads
    )
    check.true(out_layout in ("flat", "heads"), "out_layout 'flat' or 'heads'", repr(out_layout))
    head_dim = _check_source(check, source, num_heads, kv_heads, weight, bias)
    check.sizes["head_dim"] = head_dim
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check_norm(check, name, norm)
    if rope is not None:
        layouts = ("tokens half", "batch tokens half")
        check.tensor("rope.cos", rope.cos, layouts)
        check.tensor("rope.sin", rope.sin, layouts)
        check.true(rope.cos.dim() == rope.sin.dim(), "rope.sin of rope.cos's shape", tuple(rope.sin.shape))
        half = check.sizes["half"]
        check.true(0 < 2 * half <= head_dim, f"rope.cos of at most head_dim / 2 = {head_dim // 2} channels", half)
    if token_index is not None:
        check.tensor("token_index", token_index, "out_tokens", (torch.int64, torch.int32))
    options = {
        "num_heads": num_heads,
        "num_kv_heads": kv_heads,
        "weight": weight,
        "bias": bias,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "rope": rope,
        "token_index": token_index,
        "repeat_kv": repeat_kv,
        "out_layout": out_layout,
    }
    if choose_backend("extract_qk", backend, source) == "reference":
        return extract_qk_ref(source, **options)  # type: ignore[arg-type]
    from cab_kernels.qk.kernels import extract_qk_triton

    parts = weight if isinstance(weight, tuple) else (weight,)
    asked = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (source, *parts))
    check.true(
        not asked, "no gradient to be asked of backend 'triton' (call it under torch.no_grad())", "requires_grad=True"
    )
    if source.dtype == torch.float64:
        raise TypeError("extract_qk: expected source of 32 or 16 bits for backend 'triton', got float64")
    return extract_qk_triton(source, head_dim=head_dim, **options)


def _check_source(
    check: ArgumentCheck, source: torch.Tensor, num_heads: int, kv_heads: int, weight: Rows | None, bias: Rows | None
) -> int:
    """Check the source with its weight and bias; return head_dim."""
    packed_heads = num_heads + 2 * kv_heads
    if weight is None:
        check.tensor("source", source, "batch tokens packed")
        check.true(bias is None, "bias only with a weight", "a bias alone")
        packed = check.sizes["packed"]
        check.true(
            packed > 0 and packed % packed_heads == 0,
            f"source's last axis to be a multiple of num_heads + 2 * num_kv_heads = {packed_heads}",
            packed,
        )
        return packed // packed_heads
    check.tensor("source", source, "batch tokens d_model")
    check.true(
        bias is None or isinstance(bias, tuple) == isinstance(weight, tuple),
        "bias packed or as a pair like weight",
        "a tensor" if isinstance(bias, torch.Tensor) else "a pair",
    )
    if isinstance(weight, tuple):
        check.tensor("weight[0]", weight[0], "q_rows d_model")
        check.tensor("weight[1]", weight[1], "k_rows d_model")
        rows, heads, name = check.sizes["q_rows"], num_heads, "weight[0]"
    else:
        check.tensor("weight", weight, "packed d_model")
        rows, heads, name = check.sizes["packed"], packed_heads, "weight"
    check.true(rows > 0 and rows % heads == 0, f"{name}'s rows to be a multiple of {heads}", rows)
    head_dim = rows // heads
    if isinstance(weight, tuple):
        expected = kv_heads * head_dim
        got = check.sizes["k_rows"]
        check.true(got == expected, f"weight[1] of num_kv_heads * head_dim = {expected} rows", got)
    if isinstance(bias, tuple):
        check.tensor("bias[0]", bias[0], "q_rows")
        check.tensor("bias[1]", bias[1], "k_rows")
    elif bias is not None:
        check.tensor("bias", bias, "packed")
    return head_dim


def _check_norm(check: ArgumentCheck, name: str, norm: HeadNorm | None) -> None:
    if norm is None:
        return
    check.true(norm.kind in ("rms", "layer"), f"{name}.kind 'rms' or 'layer'", repr(norm.kind))
    for part in ("weight", "bias"):
        value = getattr(norm, part)
        if value is not None:
            check.tensor(f"{name}.{part}", value, "head_dim")
