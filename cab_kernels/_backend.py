"""Which implementation of an op runs: one page, one rule, no silent fallback."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

Backend = Literal["triton", "reference"]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels through its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    if not _HAS_TRITON:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def choose_backend(function: str, backend: str | None, tensor: torch.Tensor) -> Backend:
    """Return the implementation that ``function`` runs for ``tensor``.

    ``None`` chooses by device: a CUDA tensor (an AMD GPU's too) runs Triton, any other the PyTorch reference. A
    backend named explicitly runs or raises; nothing falls back silently to something slower.

    Raises:
        ValueError: the name is unknown, or ``"triton"`` was asked for a tensor that it cannot run on.
        ImportError: Triton is needed and not installed.
    """
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"{function}: expected backend None, 'triton' or 'reference', got {backend!r}")
    if backend == "reference" or (backend is None and not tensor.is_cuda):
        return "reference"
    if not _HAS_TRITON:
        raise ImportError(
            f"{function}: expected Triton for a tensor on {tensor.device}, got no module 'triton'; "
            "install it, or pass backend='reference' for the slower PyTorch implementation"
        )
    if not tensor.is_cuda and not interpreting():
        raise ValueError(f"{function}: expected CUDA tensors for backend 'triton', got a tensor on {tensor.device}")
    return "triton"
