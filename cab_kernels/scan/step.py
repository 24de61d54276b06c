"""The selective scan one token at a time: documentation, checks, choice, and the definition."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck

MAX_DSTATE = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Take one step of the selective scan, advancing ``state`` in place.

    ::

        dt    = softplus(dt + dt_bias)                    the softplus if dt_softplus
        state = exp(dt A) state + dt x B                  for each state of each row
        out   = (sum over states of C state + D x) silu(z)

    Args:
        state: (batch, dim, dstate), or (batch, nheads, headdim, dstate), in which case every (dim) below is (nheads,
            headdim); at most 256 states. It is written in its own dtype, so a half-precision state is rounded at
            every step; ``out`` is computed before that rounding.
        x, dt: (batch, dim).
        A: (dim, dstate).
        B, C: (batch, dstate), or (batch, groups, dstate), where heads share groups in order.
        D, dt_bias: (dim,), or left out.
        z: (batch, dim), or left out.
        dt_softplus: apply softplus to ``dt``, after the bias.
        state_batch_indices: (batch,), int32 or int64: the row of ``state`` that each sequence uses; ``state`` may then
            have any number of rows. A negative index is padding: ``out`` is zero there and no state is touched. No two
            sequences may name the same row.
        backend: None chooses by device; "triton" or "reference" is used or refused.

    Returns:
        ``out``, of the shape and dtype of ``x``. All arithmetic is in float32, or float64 where an input is.

    Any dtypes and strides mix; a parameter shared by all rows of a head may come expanded. This is an operation for
    inference: it works on tensors that require gradients, and raises if backward reaches it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device; the message names it.

    The recurrence is that of Mamba (arXiv:2312.00752, section 3.2) and, with heads, Mamba-2 (arXiv:2405.21060).
    """
    check = _check_arguments(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices)
    chosen = choose_backend(check.function, backend, x)
    if chosen == "triton":
        given = {"state": state, "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
        for name, tensor in given.items():
            if tensor is not None:
                check.dtype(name, tensor, KERNEL_DTYPES)
    return _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, chosen)


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Define :func:`selective_state_update`, whose arguments these are, in float32 or better, rounded once."""
    present = [tensor for tensor in (state, x, dt, A, B, C, D, z, dt_bias) if tensor is not None]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in present), torch.float32)
    rows = torch.arange(x.shape[0], device=x.device) if state_batch_indices is None else state_batch_indices.long()
    active = rows >= 0

    step = dt[active].to(dtype) + (0 if dt_bias is None else dt_bias.to(dtype))
    if dt_softplus:
        step = F.softplus(step)
    step = step.unsqueeze(-1)
    new = state[rows[active]].to(dtype) * torch.exp(step * A.to(dtype))
    new += step * x[active].to(dtype).unsqueeze(-1) * _for_rows(B[active].to(dtype), x)
    y = (new * _for_rows(C[active].to(dtype), x)).sum(-1)
    if D is not None:
        y += D.to(dtype) * x[active].to(dtype)
    if z is not None:
        y *= F.silu(z[active].to(dtype))

    state[rows[active]] = new.to(state.dtype)
    out = torch.zeros_like(x)
    out[active] = y.to(x.dtype)
    return out


def _for_rows(projection: Tensor, x: Tensor) -> Tensor:
    """B or C of each sequence or group, shaped to multiply (batch, dim, dstate) or (batch, nheads, headdim, dstate)."""
    if projection.dim() == 2:
        return projection[(slice(None),) + (None,) * (x.dim() - 1)]
    if x.dim() == 2:  # without heads there is one group
        return projection
    return projection.repeat_interleave(x.shape[1] // projection.shape[1], dim=1).unsqueeze(2)


def _check_arguments(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state_batch_indices: Tensor | None,
) -> ArgumentCheck:
    check = ArgumentCheck("selective_state_update")
    row = check.tensor("x", x, ("batch dim", "batch nheads headdim")).removeprefix("batch ")
    slots = "batch" if state_batch_indices is None else "slots"
    check.tensor("state", state, f"{slots} {row} dstate")
    check.tensor("dt", dt, f"batch {row}")
    check.tensor("A", A, f"{row} dstate")
    dstate = check.sizes["dstate"]
    check.true(1 <= dstate <= MAX_DSTATE, f"dstate from 1 to {MAX_DSTATE}", dstate)
    layout = check.tensor("B", B, ("batch dstate", "batch groups dstate"))
    check.tensor("C", C, layout)
    heads, groups = check.sizes.get("nheads", 1), check.sizes.get("groups", 1)
    check.true(groups > 0 and heads % groups == 0, "nheads to be a multiple of groups", f"{heads} and {groups}")
    for name, vector in (("D", D), ("dt_bias", dt_bias)):
        if vector is not None:
            check.tensor(name, vector, row)
    if z is not None:
        check.tensor("z", z, f"batch {row}")
    if state_batch_indices is not None:
        check.tensor("state_batch_indices", state_batch_indices, "batch", (torch.int32, torch.int64))
    return check


@torch.library.custom_op("cab_kernels::selective_state_update", mutates_args=("state",))
def _step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    state_batch_indices: Tensor | None,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return selective_state_update_ref(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    from cab_kernels.scan.step_kernels import selective_state_update_step

    return selective_state_update_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


@_step.register_fake
def _(state: Tensor, x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)
