"""Cheap activations that backward makes again instead of forward keeping them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recomputed(saved_tensors_hooks):
    """A context in which a registered tensor is not kept for backward: what would save it calls its recipe instead.

    ::

        recomputed = Recomputed()
        with recomputed:
            u = cheap(x)
            recomputed.register(u, cheap, x)
            out = costly(u)      # saves u; backward calls cheap(x) once

    Views of a registered tensor count as that tensor. A recipe runs once in a backward pass, without gradients, and
    must give the same values: nothing random. Its result lives until the last saver has been through backward.

    PyTorch asks only the innermost of such contexts. Inside another one (gradient checkpointing, which keeps less
    still) this one therefore stands back and does nothing.
    """

    def __init__(self) -> None:
        recipes: dict[int, Callable[[], Tensor]] = {}
        made: dict[int, Tensor] = {}

        # Not methods: whoever saves a tensor holds these functions, and a way from them back to the context, or to a
        # tensor with a graph, would keep everything here alive until the garbage collector happens to run.
        def pack(tensor: Tensor) -> Tensor | tuple[int, torch.Size, tuple[int, ...], int]:
            storage = tensor.untyped_storage().data_ptr()
            if storage not in recipes:
                return tensor.detach()
            return storage, tensor.shape, tensor.stride(), int(tensor.storage_offset())

        def unpack(packed: Tensor | tuple[int, torch.Size, tuple[int, ...], int]) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            storage, shape, stride, offset = packed
            if storage not in made:
                with torch.no_grad():
                    made[storage] = recipes[storage]()
            return made[storage].as_strided(shape, stride, offset)

        self._recipes = recipes
        self._stands_back = False
        super().__init__(pack, unpack)

    def __enter__(self) -> None:
        self._stands_back = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if not self._stands_back:
            super().__enter__()

    def __exit__(self, *args: object) -> None:
        if not self._stands_back:
            super().__exit__(*args)

    def register(self, tensor: Tensor, recipe: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Let ``recipe(*inputs)`` stand for ``tensor``, which fills its storage and lives as long as the context."""
        self._recipes[tensor.untyped_storage().data_ptr()] = partial(recipe, *(x.detach() for x in inputs))
