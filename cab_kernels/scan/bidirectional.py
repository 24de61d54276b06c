"""Vision Mamba's bidirectional scan: both directions of a block, gated by one gate and added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cab_kernels._backend import choose_backend
from cab_kernels._check import ArgumentCheck
from cab_kernels.scan.op import KERNEL_DTYPES, check_scanned
from cab_kernels.scan.reference import selective_scan_ref

Pair = Sequence[Tensor]


def bidirectional_selective_scan_ref(
    u: Pair,
    delta: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    z: Tensor | None = None,
    delta_bias: Pair | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Define :func:`cab_kernels.bidirectional_selective_scan_fn`, whose arguments these are: two scans, added up."""
    first, second = (
        cast(
            Tensor,
            selective_scan_ref(
                u[way],
                delta[way],
                A[way],
                B[way],
                C[way],
                None if D is None else D[way],
                z,
                None if delta_bias is None else delta_bias[way],
                delta_softplus,
                reverse=bool(way),
            ),
        )
        for way in range(2)
    )
    return first + second


def bidirectional_selective_scan_fn(
    u: Pair,
    delta: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: Pair | None = None,
    z: Tensor | None = None,
    delta_bias: Pair | None = None,
    delta_softplus: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scan a sequence in both directions, each with inputs and parameters of its own, and add the two results.

    ::

        selective_scan_fn(u[0], delta[0], A[0], B[0], C[0], D[0], z, delta_bias[0], delta_softplus)
            + selective_scan_fn(u[1], delta[1], A[1], B[1], C[1], D[1], z, delta_bias[1], delta_softplus, reverse=True)

    in the launches of one scan, forward and backward, where what both directions of a sequence read of the gate is read
    from memory once; or, where either direction fills a GPU by itself, one after the other, which is faster then. The
    result of the first is rounded before that of the second is added. Of a pair, the first scans from the first step to
    the last and the second the other way; all tensors keep the natural order of the steps.

    Args:
        u, delta: pairs of (batch, dim, length). Stored as (batch, length, dim) they are read in place, as is z; stored
            by step they are copied.
        A: a pair of (dim, dstate), real, float32 (or float64, on the reference); dstate from 1 to 256.
        B, C: pairs of (batch, groups, dstate, length), or (batch, dstate, length) for one group.
        D: a pair of (dim,), the skips.
        z: (batch, dim, length), the gate of both.
        delta_bias: a pair of (dim,).
        delta_softplus: apply softplus to delta (after the bias).
        backend: as in :func:`cab_kernels.selective_scan_fn`. Triton wants both of a pair in one dtype.

    Returns:
        (batch, dim, length) of u's dtype. Every input gets its gradient, once: a second derivative raises.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        NotImplementedError: A is complex.
        ImportError: Triton is needed and not installed.

    Source: Vision Mamba, arXiv:2401.09417, section 3.3 and algorithm 1.
    """
    check = ArgumentCheck("bidirectional_selective_scan_fn")
    pairs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    for name, pair in pairs.items():
        given = pair is not None or name not in ("D", "delta_bias")
        if given and not (isinstance(pair, (list, tuple)) and len(pair) == 2):
            got = f"{len(pair)} of them" if isinstance(pair, (list, tuple)) else type(pair).__name__
            raise TypeError(f"{check.function}: expected {name} to be a pair of tensors, got {got}")
    for way in range(2):
        skip, bias = (None if pair is None else pair[way] for pair in (D, delta_bias))
        check_scanned(check, u[way], delta[way], A[way], B[way], C[way], skip, bias, which=f"[{way}]", constant=False)
    if z is not None:
        check.tensor("z", z, "batch dim length")
    if choose_backend(check.function, backend, u[0]) == "reference":
        return bidirectional_selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    for name, pair in pairs.items():
        if pair is not None:
            check.dtype(f"{name}[0]", pair[0], KERNEL_DTYPES)
            check.dtype(f"{name}[1]", pair[1], (pair[0].dtype,))
    if z is not None:
        check.dtype("z", z, KERNEL_DTYPES)
    from cab_kernels.scan.bidirectional_kernels import BidirectionalSelectiveScan, bidirectional_selective_scan

    inputs: list[Any] = [[] if pair is None else list(pair) for pair in pairs.values()]
    inputs.insert(-1, z)
    counts = tuple(len(given) if isinstance(given, list) else None for given in inputs)
    tensors = [tensor for given in inputs for tensor in (given if isinstance(given, list) else [given])]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return BidirectionalSelectiveScan.apply(delta_softplus, counts, *tensors)
    return bidirectional_selective_scan(*inputs, delta_softplus, 0)[0]
