"""The public selective scan: its documentation, its checks, and the choice of implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.scan.reference import selective_scan_ref

MAX_DSTATE = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | Any:  # Any: a pair with return_last_state, which no caller should have to tell apart by type
    """Scan a sequence with a diagonal state-space model whose step, input and output projections depend on the input.

    For each channel, with a state ``h`` of ``dstate`` numbers (Mamba, arXiv:2312.00752, section 3 and algorithm 2)::

        delta'_t = softplus(delta_t + delta_bias)           (the softplus only if delta_softplus)
        h_t      = exp(delta'_t A) * h_{t-1} + delta'_t u_t B_t
        y_t      = <C_t, h_t> + D u_t
        out_t    = y_t silu(z_t)

    The positional arguments are those of ``mamba_ssm``. Any strides are taken without a copy: activations stored as
    (batch, length, dim), halves of one projection, B and C as slices of another. Dtypes may be mixed, as autocast
    mixes them; the arithmetic is float32 at least, and each result is rounded once.

    Args:
        u: (batch, dim, length), the input.
        delta: (batch, dim, length), the step before bias and softplus.
        A: (dim, dstate), real, float32 (or float64, on the reference); dstate from 1 to 256.
        B: (batch, groups, dstate, length), or (batch, dstate, length) for one group, or constant (dim, dstate). Each
            group serves ``dim / groups`` neighbouring channels.
        C: like B, and constant or not by itself; B and C that vary have the same number of groups.
        D: (dim,), the skip.
        z: (batch, dim, length), the gate.
        delta_bias: (dim,).
        delta_softplus: apply softplus to delta (after the bias).
        return_last_state: also return the state after the last step.
        initial_state: (batch, dim, dstate), the state before the first step; zero by default.
        reverse: scan from ``t = length - 1`` down to 0: the first step is then the last of the sequence, and the last
            state is the one after ``t = 0``. The inputs and the output keep their natural order.
        cu_seqlens: (sequences + 1,), int32: ``batch`` is 1, and sequence ``i`` lies in steps ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1] - 1``, scanned by itself (and reversed within itself). It begins with 0, ends with
            length and never falls, which is checked on a CPU only, for a look at it would stall a GPU. The states
            are then (sequences, dim, dstate). A sequence may be empty.
        backend: None chooses by device: Triton for CUDA tensors, the reference for others. ``"triton"`` and
            ``"reference"`` run or raise.

    Returns:
        ``out`` (batch, dim, length) of u's dtype, and with ``return_last_state`` also the last state (batch, dim,
        dstate) of float32 (float64 if an input is). ``out`` is dense with its axes in the order of u's in memory
        (``torch.empty_like(u)``), and from the kernels each gradient is so for its input, or contiguous if that has
        two axes or one. Every input but ``cu_seqlens`` gets its gradient, through both results, once: a second
        derivative raises.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: A is complex.
        ImportError: Triton is needed and not installed.
    """
    check = _check_arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens)
    if choose_backend(check.function, backend, u) == "reference":
        return selective_scan_ref(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            delta_bias,
            delta_softplus,
            return_last_state,
            initial_state=initial_state,
            reverse=reverse,
            cu_seqlens=cu_seqlens,
        )
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    given["initial_state"] = initial_state
    for name, tensor in given.items():
        if tensor is not None:
            check.dtype(name, tensor, KERNEL_DTYPES)
    from cab_kernels.scan.kernels import SelectiveScan, selective_scan

    arguments = (
        u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, delta_softplus, reverse, return_last_state,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given.values()):
        out, last_state = SelectiveScan.apply(*arguments)
    else:
        out, last_state, _ = selective_scan(*arguments, 0)
    return (out, last_state) if return_last_state else out


def _check_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> ArgumentCheck:
    check = ArgumentCheck("selective_scan_fn")
    check_scanned(check, u, delta, A, B, C, D, delta_bias)
    if z is not None:
        check.tensor("z", z, "batch dim length")
    if cu_seqlens is not None:
        check_packing(check, cu_seqlens)
    if initial_state is not None:
        sequences = "batch" if cu_seqlens is None else "sequences"
        check.tensor("initial_state", initial_state, f"{sequences} dim dstate")
    return check


def check_scanned(
    check: ArgumentCheck,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    which: str = "",
    constant: bool = True,
) -> None:
    """Check what a scan in one direction has of its own.

    Args:
        which: follows each argument's name in messages.
        constant: B and C may be.
    """
    check.tensor(f"u{which}", u, "batch dim length")
    check.tensor(f"delta{which}", delta, "batch dim length")
    if isinstance(A, Tensor) and A.is_complex():
        raise NotImplementedError(
            f"{check.function}: expected A{which} to be real, got complex A, which is not implemented"
        )
    check.tensor(f"A{which}", A, "dim dstate", (torch.float32, torch.float64))
    dstate = check.sizes["dstate"]
    check.true(1 <= dstate <= MAX_DSTATE, f"dstate (A's second axis) from 1 to {MAX_DSTATE}", dstate)
    layouts = ("batch dstate length", "batch groups dstate length")
    for name, matrix in (("B", B), ("C", C)):
        layout = check.tensor(f"{name}{which}", matrix, ("dim dstate", *layouts) if constant else layouts)
        if layout == "batch dstate length":
            groups = check.sizes.setdefault("groups", 1)
            got = f"shape {tuple(matrix.shape)}, one group"
            check.true(groups == 1, f"{name}{which} to have {groups} groups like B", got)
    dim, groups = check.sizes["dim"], check.sizes.get("groups", 1)
    check.true(groups > 0 and dim % groups == 0, "dim to be a multiple of groups", f"dim {dim} and groups {groups}")
    for name, vector in (("D", D), ("delta_bias", delta_bias)):
        if vector is not None:
            check.tensor(f"{name}{which}", vector, "dim")


def check_packing(check: ArgumentCheck, cu_seqlens: Tensor) -> None:
    check.tensor("cu_seqlens", cu_seqlens, "sequences+1", (torch.int32,))
    batch, length, sequences = check.sizes["batch"], check.sizes["length"], len(cu_seqlens) - 1
    check.true(batch == 1, "batch 1 with cu_seqlens", batch)
    check.true(sequences > 0, "cu_seqlens of at least two entries", len(cu_seqlens))
    check.sizes["sequences"] = sequences
    if not cu_seqlens.is_cuda:
        bounds = cu_seqlens.tolist()
        check.true(
            bounds[0] == 0 and bounds[-1] == length and bounds == sorted(bounds),
            f"cu_seqlens to rise from 0 to length {length}",
            bounds,
        )
