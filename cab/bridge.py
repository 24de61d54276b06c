"""The bridges: small MLPs that map the student's B to the teacher's K, and its C to the teacher's Q."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BridgeWeights(NamedTuple):
    """Of some bridges: (bridges, hidden, d_state), (bridges, hidden), (bridges, width, hidden), (bridges, width).

    Linear bridges have no hidden layer: ``w1`` and ``b1`` are None, and ``w2`` is (bridges, width, d_state).
    """

    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor


class BridgeStack(nn.Module):
    """Many bridges of one size, W2 silu(W1 x + b1) + b2 each, with their parameters stacked along the first axis.

    Stacked, the optimiser updates four tensors instead of four a bridge.

    Args:
        count: bridges.
        d_state: width of what comes in.
        hidden: width of the hidden layer; 0 leaves it out, W2 x + b2.
        width: width of what goes out.
        repeat: how many times the stack serves, one time after the other.
    """

    w1: nn.Parameter | None
    b1: nn.Parameter | None

    def __init__(self, count: int, d_state: int, hidden: int, width: int, repeat: int = 1) -> None:
        super().__init__()
        self.repeat = repeat
        self.register_parameter("w1", nn.Parameter(torch.empty(count, hidden, d_state)) if hidden else None)
        self.register_parameter("b1", nn.Parameter(torch.empty(count, hidden)) if hidden else None)
        self.w2 = nn.Parameter(torch.empty(count, width, hidden or d_state))
        self.b2 = nn.Parameter(torch.empty(count, width))
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            if weight is not None and bias is not None:
                bound = 1 / math.sqrt(weight.shape[-1])  # as nn.Linear starts
                nn.init.uniform_(weight, -bound, bound)
                nn.init.uniform_(bias, -bound, bound)

    def split(self, counts: Sequence[int]) -> list[BridgeWeights]:
        """The weights of the first ``counts[0]`` bridges, of the next ``counts[1]``, ..., as views.

        The gradient of one split is one concatenation, however many groups there are.
        """
        parts = (self._parts(stack, list(counts)) for stack in (self.w1, self.b1, self.w2, self.b2))
        return [BridgeWeights(*group) for group in zip(*parts, strict=True)]

    def _parts(self, stack: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
        if stack is None:
            return [None] * len(counts)
        if self.repeat > 1:
            stack = stack.repeat(self.repeat, *(1 for _ in stack.shape[1:]))
        return stack.split(counts)


class Bridges(nn.Module):
    """A bridge for B and one for C of every direction of every student layer, in the order of the layers.

    A learned layer map is a part of them: it is trained, saved and thrown away like them.

    Args:
        layers: Mamba layers of the student.
        directions: scan directions of a layer, 1 or 2.
        d_state: width of B and C.
        hidden: width of the bridges' hidden layer; 0 makes them linear.
        key_width: heads * head_dim of the teacher's K.
        query_width: the same of Q.
        shared: one bridge for B and one for C of a direction serve all layers.
        teacher_layers: of a learned layer map; None where the map is fixed.

    Attributes:
        layer_logits: (layers, teacher_layers), whose softmax is each student layer's share in every teacher layer; it
            starts even. None where the map is fixed.

    Raises:
        ValueError: a size below 1, or a hidden layer of less than 0.

    Source: arXiv:2510.19266, section 3.2.
    """

    layer_logits: nn.Parameter | None

    def __init__(
        self,
        layers: int,
        directions: int,
        d_state: int,
        hidden: int,
        key_width: int,
        query_width: int,
        shared: bool = False,
        teacher_layers: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"layers": layers, "directions": directions, "d_state": d_state}
        if teacher_layers is not None:
            sizes["teacher_layers"] = teacher_layers
        for name, size in (sizes | {"key_width": key_width, "query_width": query_width}).items():
            if size < 1:
                raise ValueError(f"Bridges: expected {name} of at least 1, got {size}")
        if hidden < 0:
            raise ValueError(f"Bridges: expected hidden of at least 0, got {hidden}")
        self.layers = layers
        self.directions = directions
        self.d_state = d_state
        self.key_width = key_width
        self.query_width = query_width
        count, repeat = (directions, layers) if shared else (layers * directions, 1)
        self.key = BridgeStack(count, d_state, hidden, key_width, repeat)
        self.query = BridgeStack(count, d_state, hidden, query_width, repeat)
        logits = None if teacher_layers is None else nn.Parameter(torch.zeros(layers, teacher_layers))
        self.register_parameter("layer_logits", logits)

    def no_weight_decay(self) -> set[str]:
        """Names of the biases, which stacked have two axes and do not show by their shape, and of the layer map."""
        return {name for name, _ in self.named_parameters() if name.endswith((".b1", ".b2", "layer_logits"))}
