"""Causal depthwise convolution over time with an optional SiLU: documentation, checks, choice of implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.conv.reference import causal_conv1d_ref

ACTIVATIONS = (None, "silu", "swish")
INDEX_DTYPES = (torch.int32, torch.int64)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | Any:  # Any: a pair with return_final_states, which no caller should have to tell apart by type
    """Convolve every channel over time with its own short causal filter, then apply SiLU if asked.

    ::

        out[b, d, t] = act(bias[d] + sum_k weight[d, width - 1 - k] * x[b, d, t - k])     k = 0 ... width - 1
        out[b, d, t] = act(bias[d] + sum_k weight[d, width - 1 - k] * x[b, d, t + k])     with reverse

    ``x`` before the first step is ``initial_states``, or zero. The sum is taken in float32 and rounded once.

    Args:
        x: (batch, dim, length), any floating dtype and any strides. Memory where time runs fastest and memory where
            channels run fastest, a transposed (batch, length, dim), are both read in place, and so is a slice of
            either, such as one half of a packed projection.
        weight: (dim, width).
        bias: (dim,).
        activation: None, "silu" or its other name "swish".
        initial_states: (batch, dim, width - 1), the inputs just before the first step, the nearest one last.
        return_final_states: also return (batch, dim, width - 1), the last inputs, the latest one last: the
            ``initial_states`` for a continuation. In the dtype of ``x``.
        reverse: run from the last step to the first: the same as flipping ``x`` over time, convolving and flipping
            back. "Before" and "last", above, are then meant in the order in which the steps are taken.
        cu_seqlens: (sequences + 1,), int32 or int64: ``x`` has batch 1 and holds sequences back to back, sequence i
            from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; none sees another. The values are not checked.
        seq_idx: (batch, length), int32 or int64, another way to say the same: a step sees only steps of its own
            index, and where the index is negative the output is zero.
        backend: None chooses by device; "triton" or "reference" is used or refused.

    Returns:
        ``out`` of the shape and dtype of ``x``, with time or channels contiguous as in ``x``; with
        ``return_final_states`` the pair ``(out, final_states)``.

    Gradients reach ``x``, ``weight``, ``bias`` and ``initial_states``, each in its own dtype, summed in float32 in a
    fixed order. There are no second derivatives on the Triton backend.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or arguments that exclude each
            other; the message names the argument.
    """
    check = _check_arguments(x, weight, bias, activation, initial_states)
    seq_idx = _sequence_index(check, x, cu_seqlens, seq_idx)
    if seq_idx is not None:
        check.true(initial_states is None, "no initial_states with cu_seqlens or seq_idx", "both")
        check.true(not return_final_states, "no return_final_states with cu_seqlens or seq_idx", "both")

    width = weight.shape[1]
    if choose_backend(check.function, backend, x) == "reference":
        out = causal_conv1d_ref(
            x, weight, bias, activation, initial_states=initial_states, seq_idx=seq_idx, reverse=reverse
        )
    else:
        given = {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}
        for name, tensor in given.items():
            if tensor is not None:
                check.dtype(name, tensor, KERNEL_DTYPES)
        from cab_kernels.conv.kernels import MAX_WIDTH, CausalConv1d, causal_conv1d

        check.true(width <= MAX_WIDTH, f"weight with at most {MAX_WIDTH} taps for backend 'triton'", width)
        run = CausalConv1d.apply if torch.is_grad_enabled() else causal_conv1d
        out = run(x, weight, bias, initial_states, seq_idx, activation is not None, reverse)
    if return_final_states:
        return out, _final_states(x, initial_states, width, reverse)
    return out


def _check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_states: Tensor | None
) -> ArgumentCheck:
    check = ArgumentCheck("causal_conv1d_fn")
    check.tensor("x", x, "batch dim length")
    check.tensor("weight", weight, "dim width")
    width = weight.shape[1]
    check.true(width >= 1, "weight with at least one tap", tuple(weight.shape))
    if bias is not None:
        check.tensor("bias", bias, "dim")
    check.true(activation in ACTIVATIONS, "activation None, 'silu' or 'swish'", repr(activation))
    if initial_states is not None:
        check.sizes["width-1"] = width - 1
        check.tensor("initial_states", initial_states, "batch dim width-1")
    return check


def _sequence_index(
    check: ArgumentCheck, x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None
) -> Tensor | None:
    """The index of each step's sequence, (batch, length), or None where a row of the batch is one sequence."""
    if seq_idx is not None:
        check.tensor("seq_idx", seq_idx, "batch length", INDEX_DTYPES)
        check.true(cu_seqlens is None, "one of cu_seqlens and seq_idx", "both")
        return seq_idx
    if cu_seqlens is None:
        return None
    check.tensor("cu_seqlens", cu_seqlens, "sequences+1", INDEX_DTYPES)
    check.true(cu_seqlens.shape[0] >= 1, "cu_seqlens with at least one entry", tuple(cu_seqlens.shape))
    check.true(x.shape[0] == 1, "x of batch 1 with cu_seqlens", f"batch {x.shape[0]}")
    return sequence_index(cu_seqlens, x.shape[2])


def sequence_index(cu_seqlens: Tensor, length: int) -> Tensor:
    """The index of each step's sequence, (1, length), of sequences back to back."""
    step = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.bucketize(step, cu_seqlens, out_int32=True, right=True) - 1).unsqueeze(0)


def _final_states(x: Tensor, initial_states: Tensor | None, width: int, reverse: bool) -> Tensor:
    """The last ``width - 1`` inputs in the order in which they are met, as a tensor of its own."""
    if initial_states is None:
        initial_states = x.new_zeros(x.shape[0], x.shape[1], width - 1)
    last = x[..., : width - 1].flip(-1) if reverse else x[..., max(x.shape[2] - (width - 1), 0) :]
    return torch.cat([initial_states.to(x.dtype)[..., last.shape[2] :], last], dim=-1)
