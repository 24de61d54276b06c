"""Layers of models that are not trained, which have less to do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab_kernels import frozen_layer_norm_fn


class FrozenLinear(nn.Linear):
    """A linear layer whose parameters are cast for autocast once, and not in every pass.

    Autocast itself remembers the casts of what is trained alone, and none while a CUDA graph is captured.
    """

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if not torch.is_autocast_enabled(device) or self.weight.dtype == torch.float64:  # which autocast leaves alone
            return super().forward(x)
        dtype = torch.get_autocast_dtype(device)
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        source = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        # One for each dtype: a captured graph may still read what another dtype's pass would throw away.
        casts: dict[torch.dtype, tuple[Any, list[Tensor]]] = self.__dict__.setdefault("casts", {})
        if dtype not in casts or casts[dtype][0] != source:
            casts[dtype] = source, [tensor.to(dtype) for tensor in tensors]
        return F.linear(x, *casts[dtype][1])


class FrozenLayerNorm(nn.LayerNorm):
    """A layer norm without a gradient; under autocast its result is what the linear layer after it would cast it to."""

    def forward(self, x: Tensor) -> Tensor:
        return frozen_layer_norm_fn(x, self.weight, self.bias, self.eps)
