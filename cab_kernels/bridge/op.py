"""The bridge loss: a two-layer MLP and the mean squared error to a teacher's K or Q, in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.bridge.reference import bridge_mse_grouped_ref

_INDEX = (torch.int64, torch.int32)
_WEIGHTS = ("w1", "b1", "w2", "b2")
_WEIGHT_LAYOUTS = ("hidden d_state", "hidden", "width hidden", "width")


def bridge_mse(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    target: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
    target_mean: torch.Tensor | None = None,
    target_rstd: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Mean squared error of a two-layer MLP of ``x`` to ``target``, a 0-d float32 tensor.

    ``mean((w2 @ silu(w1 @ x + b1) + b2 - target) ** 2)`` over the tokens that count times the target's channels. The
    gradients are made in the forward pass, so ``target`` is not kept for backward and, where the sizes allow (16-bit
    floats, ``hidden`` up to 128), neither the hidden layer nor the prediction is ever written to memory; larger
    bridges go through buffers of a few thousand tokens, and in bfloat16, where ``hidden`` is at most ``d_state``, they
    keep the gradient of that layer for backward in the place of x's.

    Args:
        x: (tokens, d_state) or (batch, length, d_state), with any strides: a slice of a packed projection, or a
            transposed (batch, d_state, length).
        w1, b1: (hidden, d_state) and (hidden,).
        w2, b2: (width, hidden) and (width,).
        target: (tokens, width) for x of two axes, else (batch, target_length, width) or (batch, heads, target_length,
            head_dim) with ``heads * head_dim == width``, head by head; any strides, any floating dtype. A map of the
            target other than the standardisation below (a softmax, say) is the caller's to apply.
        mask: optional bool, (tokens,) or (batch, length); True counts. What does not count may be NaN.
        token_index: optional integers (length,): student token t meets target token ``token_index[t]``; -1 leaves t
            out, as the mask does. Reversed order, a moved cls token and absent prefix tokens are all such an index.
            Without it, t meets t. Values of ``target_length`` or more are an error of the caller: on a CPU they raise;
            a kernel, which could not without waiting for the GPU, gives a loss of NaN, and the reference on a GPU fails
            in PyTorch's own check there.
        target_mean, target_rstd: optional (width,), both or neither: the target is standardised,
            ``(target - mean) * rstd``, as it is read.
        backend: None, "triton" or "reference".

    x, w1, b1, w2 and b2 get a gradient, on Triton once: a second derivative raises. Where nothing counts, the loss and
    its gradients are 0. Products run in the autocast dtype under ``torch.autocast`` and in x's dtype otherwise (the
    weights may be float32 all the while), and accumulate in float32; float32 ones honour
    ``torch.get_float32_matmul_precision()``. The reference computes in at least float32 always.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or devices disagree, the backend cannot run, or, on a CPU, token_index is beyond the target.

    Source: the bridge of arXiv:2510.19266, section 3.
    """
    check = ArgumentCheck("bridge_mse")
    layout = check.tensor("x", x, ("tokens d_state", "batch length d_state"))
    _check_weights(check, (w1, b1, w2, b2), "")
    _check_target(check, "target", target, layout, token_index)
    if mask is not None:
        check.tensor("mask", mask, layout.removesuffix(" d_state"), (torch.bool,))
    if token_index is not None:
        check.tensor("token_index", token_index, layout.split()[-2], _INDEX)
    _check_statistics(check, target_mean, target_rstd, ("width",))
    stacks = [[weight.unsqueeze(0)] for weight in (w1, b1, w2, b2)]
    options = (mask, token_index, target_mean, target_rstd)
    return _run(check, backend, [x], stacks, [target], options).squeeze(0)


def bridge_mse_grouped(
    xs: Sequence[torch.Tensor],
    w1: torch.Tensor | Sequence[torch.Tensor],
    b1: torch.Tensor | Sequence[torch.Tensor],
    w2: torch.Tensor | Sequence[torch.Tensor],
    b2: torch.Tensor | Sequence[torch.Tensor],
    target: torch.Tensor | Sequence[torch.Tensor],
    *,
    mask: torch.Tensor | None = None,
    token_index: torch.Tensor | None = None,
    target_mean: torch.Tensor | None = None,
    target_rstd: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """The losses of several bridges of one size, (bridges,) float32, in few launches; see :func:`bridge_mse`.

    The weights are stacks: give each call a stack that is a parameter of its own, or split one large stack with
    ``torch.split``, whose backward is a single concatenation (that of an index fills the whole stack with zeros for
    each bridge).

    Args:
        xs: one x a bridge, all of one shape and dtype. They are read where they lie; nothing is stacked.
        w1, b1, w2, b2: (bridges, hidden, d_state), (bridges, hidden), (bridges, width, hidden), (bridges, width); or
            sequences of such stacks, one for each target, which hold its bridges only. The gradients of the stacks of
            a sequence are then parts of one tensor in memory.
        target: one tensor that all bridges share, or a sequence of as many as divide the bridges: the first target
            then serves the first ``bridges / targets`` bridges, and so on. The fewer targets a call has, and the sooner
            it comes, the less memory the teacher's take; the more it has, the fewer launches there are, where the
            bridges stay on chip. A layer's K and Q, which the teacher makes at the same time, belong in one call.
        mask: as in :func:`bridge_mse`, or with a leading axis (bridges, ...).
        token_index: (length,), or (bridges, length) where directions differ.
        target_mean, target_rstd: (width,), or (targets, width).
        backend: None, "triton" or "reference".

    Raises:
        TypeError, ValueError: as :func:`bridge_mse` does.
    """
    check = ArgumentCheck("bridge_mse_grouped")
    xs = list(xs)
    check.true(len(xs) > 0, "xs to hold at least one tensor", "none")
    for i, x in enumerate(xs):
        layout = check.tensor(f"xs[{i}]", x, ("tokens d_state", "batch length d_state"))
        check.true(x.dim() == xs[0].dim(), f"xs[{i}] of as many axes as xs[0]", tuple(x.shape))
        check.true(x.dtype == xs[0].dtype, f"xs[{i}] of dtype {xs[0].dtype} like xs[0]", x.dtype)
    check.sizes["bridges"] = len(xs)
    alone = isinstance(target, torch.Tensor)
    targets = [target] if isinstance(target, torch.Tensor) else list(target)
    check.true(
        len(targets) > 0 and len(xs) % len(targets) == 0, f"the number of targets to divide {len(xs)}", len(targets)
    )
    check.sizes["targets"] = len(targets)
    stacks = _check_stacks(check, (w1, b1, w2, b2), len(xs) // len(targets), len(targets))
    for j, one in enumerate(targets):
        name = "target" if alone else f"target[{j}]"
        _check_target(check, name, one, layout, token_index)
        check.true(one.dim() == targets[0].dim(), f"{name} of as many axes as target[0]", tuple(one.shape))
        check.true(one.dtype == targets[0].dtype, f"{name} of dtype {targets[0].dtype} like target[0]", one.dtype)
    tokens = layout.removesuffix(" d_state")
    if mask is not None:
        check.tensor("mask", mask, (tokens, f"bridges {tokens}"), (torch.bool,))
    if token_index is not None:
        length = layout.split()[-2]
        check.tensor("token_index", token_index, (length, f"bridges {length}"), _INDEX)
    _check_statistics(check, target_mean, target_rstd, ("width", "targets width"))
    options = (mask, token_index, target_mean, target_rstd)
    return _run(check, backend, xs, stacks, targets, options)


def _check_weights(
    check: ArgumentCheck, weights: Sequence[torch.Tensor], leading: str, at: str = "", dtype: torch.dtype | None = None
) -> None:
    for name, value, axes in zip(_WEIGHTS, weights, _WEIGHT_LAYOUTS, strict=True):
        check.tensor(name + at, value, leading + axes)
        dtype = value.dtype if dtype is None else dtype
        check.true(value.dtype == dtype, f"{name + at} of dtype {dtype} like w1", value.dtype)
        check.true(value.numel() > 0, f"{name + at} of no axis of size 0", tuple(value.shape))


def _check_stacks(check: ArgumentCheck, weights: Sequence[Any], share: int, targets: int) -> list[list[torch.Tensor]]:
    """The stacks of each weight: one of all bridges, or for each target one of the ``share`` bridges that it serves."""
    if isinstance(weights[0], torch.Tensor):
        _check_weights(check, weights, "bridges ")
        return [[stack] for stack in weights]
    stacks = []
    for name, value in zip(_WEIGHTS, weights, strict=True):
        known = isinstance(value, Sequence) and not isinstance(value, str)
        if not known:
            raise TypeError(f"{check.function}: expected {name} to be stacks like w1, got {type(value).__name__}")
        check.true(len(value) == targets, f"{name} of as many stacks as there are targets, {targets}", len(value))
        stacks.append(list(value))
    check.sizes["bridges_of_a_target"] = share
    for j, stack in enumerate(zip(*stacks, strict=True)):
        _check_weights(check, stack, "bridges_of_a_target ", f"[{j}]", None if j == 0 else stacks[0][0].dtype)
    return stacks


def _check_target(
    check: ArgumentCheck, name: str, target: torch.Tensor, layout: str, token_index: torch.Tensor | None
) -> None:
    """The target's tokens match x's one by one unless an index matches them."""
    if layout == "tokens d_state":
        check.tensor(name, target, "tokens width" if token_index is None else "target_tokens width")
        return
    length = "length" if token_index is None else "target_length"
    found = check.tensor(name, target, (f"batch {length} width", f"batch heads {length} head_dim"))
    if "heads" in found:
        heads, head_dim = target.shape[1], target.shape[3]
        width = check.sizes["width"]
        check.true(heads * head_dim == width, f"{name} with heads * head_dim = {width}", f"{heads} * {head_dim}")


def _check_statistics(
    check: ArgumentCheck, mean: torch.Tensor | None, rstd: torch.Tensor | None, layouts: Sequence[str]
) -> None:
    check.true((mean is None) == (rstd is None), "target_mean and target_rstd together", "one of them")
    if mean is not None and rstd is not None:
        check.tensor("target_mean", mean, layouts)
        check.tensor("target_rstd", rstd, layouts)
        check.true(mean.shape == rstd.shape, "target_rstd of target_mean's shape", tuple(rstd.shape))


def _check_reach(check: ArgumentCheck, token_index: torch.Tensor, target_length: int) -> None:
    """Refuse an index beyond the target where its values can be read without waiting."""
    readable = type(token_index) is torch.Tensor and not torch.compiler.is_compiling()
    if readable and token_index.device.type == "cpu" and token_index.numel():
        last = int(token_index.max())
        check.true(last < target_length, f"token_index below target_length = {target_length}", last)


def _run(
    check: ArgumentCheck,
    backend: str | None,
    xs: list[torch.Tensor],
    stacks: list[list[torch.Tensor]],
    targets: list[torch.Tensor],
    options: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    w1, b1, w2, b2 = stacks
    mask, token_index, target_mean, target_rstd = options
    if choose_backend(check.function, backend, xs[0]) == "triton":
        if xs[0].dtype == torch.float64:
            raise TypeError(f"{check.function}: expected x of 32 or 16 bits for backend 'triton', got float64")
        from cab_kernels.bridge.kernels import bridge_mse_triton

        return bridge_mse_triton(xs, w1, b1, w2, b2, targets, mask, token_index, target_mean, target_rstd)
    if token_index is not None:
        _check_reach(check, token_index, targets[0].shape[-2])
    losses = bridge_mse_grouped_ref(
        xs,
        w1,
        b1,
        w2,
        b2,
        targets,
        mask=mask,
        token_index=token_index,
        target_mean=target_mean,
        target_rstd=target_rstd,
    )
    return losses.to(torch.float32)
