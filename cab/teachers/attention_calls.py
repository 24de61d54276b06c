"""Reading Q and K where attention is computed, whatever the model: function modes that look at its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cab.teachers.teacher import AttentionSink


class ScaledDotProductCalls(TorchFunctionMode):
    """Shows Q and K of each self-attention that passes through ``scaled_dot_product_attention``."""

    def __init__(self, show: AttentionSink) -> None:
        super().__init__()
        self.show = show

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key = args[0], args[1]
            if query.shape[-2] == key.shape[-2]:  # pooling by a few learned queries is no layer of the sequence
                self.show(query, key)
        return function(*args, **kwargs)


class WrittenOutCalls(TorchFunctionMode):
    """Shows Q and K of each self-attention that is written out as softmax(Q K^T) V.

    A product of (..., tokens, head_dim) with (..., head_dim, tokens) is taken for the scores; the next product whose
    left operand has the shape of these scores, folded or not, is the weighted sum of the values, and is passed over.
    Heads that are folded into the batch are unfolded.

    Args:
        show: called with Q and K of (batch, heads, tokens, head_dim).
        heads: of a layer.
    """

    def __init__(self, show: AttentionSink, heads: int) -> None:
        super().__init__()
        self.show = show
        self.heads = heads
        self.scores: torch.Size | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        operands = _PRODUCTS.get(function)
        if operands is not None:
            self._look(*operands(*args, **kwargs), out.shape)
        return out

    def _look(self, left: Tensor, right: Tensor, out: torch.Size) -> None:
        scores = self.scores  # which may have been unfolded meanwhile
        if scores is not None and left.shape[-2:] == scores[-2:] and left.numel() == scores.numel():
            self.scores = None
        elif len(out) in (3, 4) and out[-2] == out[-1] and left.shape[-1] > 1:  # angles of positions have one axis less
            self.scores = out
            query, key = left, right.transpose(-1, -2)
            if len(out) == 3:
                query, key = query.unflatten(0, (-1, self.heads)), key.unflatten(0, (-1, self.heads))
            self.show(query, key)


def _both(left: Tensor, right: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return left, right


def _after_sum(total: Tensor, batch1: Tensor, batch2: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return batch1, batch2


_PRODUCTS: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    torch.matmul: _both,
    torch.bmm: _both,
    torch.baddbmm: _after_sum,
    Tensor.matmul: _both,
    Tensor.__matmul__: _both,
    Tensor.bmm: _both,
    Tensor.baddbmm: _after_sum,
}
