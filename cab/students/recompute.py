"""Cheap activations that backward makes again instead of forward keeping them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputed(saved_tensors_hooks):
    """A context in which a registered tensor is not kept for backward: what would save it calls its recipe instead.

    ::

        recomputed = Recomputed()
        with recomputed:
            u = cheap(x)
            recomputed.register(u, lambda: cheap(x))
            out = costly(u)      # saves u; backward calls cheap(x) once

    Views of a registered tensor count as that tensor. A recipe runs once in a backward pass, without gradients, and
    must give the same values: nothing random. Its result lives until the last saver has been through backward.

    PyTorch asks only the innermost of such contexts. Inside another one (gradient checkpointing, which keeps less
    still) this one therefore stands back and does nothing.
    """

    def __init__(self) -> None:
        self._recipes: dict[int, Callable[[], Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        self._stands_back = False
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._stands_back = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if not self._stands_back:
            super().__enter__()

    def __exit__(self, *args: object) -> None:
        if not self._stands_back:
            super().__exit__(*args)

    def register(self, tensor: Tensor, recipe: Callable[[], Tensor]) -> None:
        """Let ``recipe`` stand for ``tensor``, which fills its storage and is kept by the caller within the context."""
        self._recipes[tensor.untyped_storage().data_ptr()] = recipe

    def _pack(self, tensor: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...], int]:
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._recipes:
            return tensor
        return storage, tensor.shape, tensor.stride(), int(tensor.storage_offset())

    def _unpack(self, packed: Tensor | tuple[int, torch.Size, tuple[int, ...], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        storage, shape, stride, offset = packed
        if storage not in self._made:
            with torch.no_grad():
                self._made[storage] = self._recipes[storage]()
        return self._made[storage].as_strided(shape, stride, offset)
