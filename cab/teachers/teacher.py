"""What distillation asks of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

# (layer, query, key): (batch, heads, tokens, head_dim) each, as the layer's attention sees them.
LayerSink = Callable[[int, Tensor, Tensor], None]
# (query, key) of the layers, one after the other.
AttentionSink = Callable[[Tensor, Tensor], None]
# Reads Q and K of whatever the model runs inside it.
Tap = Callable[[nn.Module, AttentionSink], AbstractContextManager[object]]


class Teacher(nn.Module):
    """A frozen Transformer that hands Q and K of each attention layer to a callback.

    Nothing is kept: when the callback has returned, the layer's Q and K die with the layer's other activations.

    Attributes:
        model: the Transformer.
        name: what messages call it.
        num_layers: attention layers.
        key_width, query_width: heads * head_dim of K and of Q.
        stays: the model stays where it is and as it is, whatever is done to the task.
    """

    stays = False
    model: nn.Module
    name: str
    num_layers: int
    key_width: int
    query_width: int
    _tap: Tap

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a teacher does not drop paths or update statistics."""
        return super().train(False)

    def _stream(self, run: Callable[[], Tensor], on_layer: LayerSink | None) -> Tensor:
        """What ``run`` returns, without a gradient; ``on_layer`` sees the layers in the caller's gradient mode."""
        if on_layer is None:
            with torch.no_grad():
                return run()
        grad_enabled = torch.is_grad_enabled()
        seen = 0

        def show(query: Tensor, key: Tensor) -> None:
            nonlocal seen
            with torch.set_grad_enabled(grad_enabled):
                on_layer(seen, query, key)
            seen += 1

        with torch.no_grad(), self._tap(self.model, show):
            out = run()
        if seen != self.num_layers:
            raise self._refusal(f"expected Q and K of {self.num_layers} layers, got {seen}")
        return out

    def _refusal(self, reason: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: cannot read Q and K of {self.name}: {reason}")
