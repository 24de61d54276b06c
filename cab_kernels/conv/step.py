"""The causal convolution a few new steps at a time: documentation, checks, choice, and the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.conv.op import ACTIVATIONS, INDEX_DTYPES, KERNEL_DTYPES
from cab_kernels.conv.reference import causal_conv1d_ref


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Continue :func:`causal_conv1d_fn` by the steps of ``x``, keeping the last inputs in ``conv_state``, in place.

    Args:
        x: (batch, dim) for one step, or (batch, dim, length).
        conv_state: (batch, dim, state_len) with state_len >= width - 1, in any dtype and with any strides. The latest
            input stands last: each step drops the first and appends its own.
        weight: (dim, width).
        bias: (dim,).
        activation: None, "silu" or its other name "swish".
        cache_seqlens: (batch,), int32 or int64, not negative: ``conv_state`` is a ring, in which nothing moves; this
            many steps came before, so the first new input goes to ``cache_seqlens % state_len``.
        conv_state_indices: (batch,), int32 or int64: the row of ``conv_state`` that each sequence uses; there may then
            be any number of rows. A negative index is padding: ``out`` is zero there and no state is touched. No two
            sequences may name the same row.
        backend: None chooses by device; "triton" or "reference" is used or refused.

    Returns:
        ``out``, of the shape and dtype of ``x``. The sum is taken in float32 and rounded once.

    This is an operation for inference: it works on tensors that require gradients, and raises if backward reaches it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.
    """
    check = _check_arguments(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    chosen = choose_backend(check.function, backend, x)
    if chosen == "triton":
        given = {"x": x, "conv_state": conv_state, "weight": weight, "bias": bias}
        for name, tensor in given.items():
            if tensor is not None:
                check.dtype(name, tensor, KERNEL_DTYPES)
    new = x.unsqueeze(-1) if x.dim() == 2 else x
    out = _update(new, conv_state, weight, bias, activation is not None, cache_seqlens, conv_state_indices, chosen)
    return out.squeeze(-1) if x.dim() == 2 else out


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Define :func:`causal_conv1d_update`, whose arguments these are, in float32 or better, rounded once."""
    new = x.unsqueeze(-1) if x.dim() == 2 else x
    width, state_len = weight.shape[1], conv_state.shape[2]
    rows = torch.arange(x.shape[0], device=x.device) if conv_state_indices is None else conv_state_indices.long()
    active = rows >= 0
    past, new = conv_state[rows[active]], new[active]
    dtype = torch.promote_types(past.dtype, new.dtype)
    if cache_seqlens is None:
        window = past[..., state_len - (width - 1) :]
        after = torch.cat([past.to(dtype), new.to(dtype)], dim=-1)[..., new.shape[2] :]
    else:
        window = past.gather(2, _places(cache_seqlens[active], 1 - width, 0, past))
        # Of more new steps than the ring holds, the last ones stay.
        first = max(new.shape[2] - state_len, 0)
        places = _places(cache_seqlens[active], first, new.shape[2], past)
        after = past.to(dtype).scatter(2, places, new[..., first:].to(dtype))
    y = causal_conv1d_ref(new, weight, bias, activation, initial_states=window)

    conv_state[rows[active]] = after.to(conv_state.dtype)
    out = torch.zeros_like(x)
    out[active] = y.reshape(y.shape[: x.dim()])
    return out


def _places(cache_seqlens: Tensor, start: int, stop: int, ring: Tensor) -> Tensor:
    """Where in the ring (batch, dim, state_len) the steps ``start`` to ``stop`` after ``cache_seqlens`` stand."""
    step = torch.arange(start, stop, device=ring.device) + cache_seqlens.long().unsqueeze(1)
    return (step % ring.shape[2]).unsqueeze(1).expand(-1, ring.shape[1], -1)


def _check_arguments(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> ArgumentCheck:
    check = ArgumentCheck("causal_conv1d_update")
    check.tensor("x", x, ("batch dim", "batch dim length"))
    check.tensor("conv_state", conv_state, f"{'batch' if conv_state_indices is None else 'slots'} dim state_len")
    check.tensor("weight", weight, "dim width")
    width, state_len = check.sizes["width"], check.sizes["state_len"]
    check.true(width >= 1, "weight with at least one tap", tuple(weight.shape))
    check.true(
        state_len >= max(width - 1, 1 if cache_seqlens is not None else 0),
        f"conv_state with a state_len of width - 1 = {width - 1} or more",
        tuple(conv_state.shape),
    )
    if bias is not None:
        check.tensor("bias", bias, "dim")
    check.true(activation in ACTIVATIONS, "activation None, 'silu' or 'swish'", repr(activation))
    for name, vector in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if vector is not None:
            check.tensor(name, vector, "batch", INDEX_DTYPES)
    return check


@torch.library.custom_op("cab_kernels::causal_conv1d_update", mutates_args=("conv_state",))
def _update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "reference":
        activation = "silu" if silu else None
        return causal_conv1d_update_ref(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
    from cab_kernels.conv.step_kernels import causal_conv1d_update_step

    return causal_conv1d_update_step(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)


@_update.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)
