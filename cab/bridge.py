"""The bridges: small MLPs that map the student's B to the teacher's K, and its C to the teacher's Q."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BridgeWeights(NamedTuple):
    """Of some bridges: (bridges, hidden, d_state), (bridges, hidden), (bridges, width, hidden), (bridges, width)."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


class BridgeStack(nn.Module):
    """Many bridges of one size, W2 silu(W1 x + b1) + b2 each, with their parameters stacked along the first axis.

    Stacked, the optimiser updates four tensors instead of four a bridge.

    Args:
        count: bridges.
        d_state: width of what comes in.
        hidden: width of the hidden layer.
        width: width of what goes out.
    """

    def __init__(self, count: int, d_state: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(count, hidden, d_state))
        self.b1 = nn.Parameter(torch.empty(count, hidden))
        self.w2 = nn.Parameter(torch.empty(count, width, hidden))
        self.b2 = nn.Parameter(torch.empty(count, width))
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])  # as nn.Linear starts
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def split(self, counts: Sequence[int]) -> list[BridgeWeights]:
        """The weights of the first ``counts[0]`` bridges, of the next ``counts[1]``, ..., as views.

        The gradient of one split is one concatenation, however many groups there are.
        """
        stacks = (self.w1, self.b1, self.w2, self.b2)
        return [BridgeWeights(*group) for group in zip(*(stack.split(list(counts)) for stack in stacks), strict=True)]


class Bridges(nn.Module):
    """A bridge for B and one for C of every direction of every student layer, in the order of the layers.

    Args:
        layers: student layers.
        directions: scan directions of a layer, 1 or 2.
        d_state: width of B and C.
        hidden: width of the bridges' hidden layer.
        key_width: heads * head_dim of the teacher's K.
        query_width: the same of Q.

    Source: arXiv:2510.19266, section 3.2.
    """

    def __init__(
        self, layers: int, directions: int, d_state: int, hidden: int, key_width: int, query_width: int
    ) -> None:
        super().__init__()
        self.layers = layers
        self.directions = directions
        self.key = BridgeStack(layers * directions, d_state, hidden, key_width)
        self.query = BridgeStack(layers * directions, d_state, hidden, query_width)

    def no_weight_decay(self) -> set[str]:
        """Names of the biases: stacked they have two axes, and do not show as biases by their shape."""
        return {name for name, _ in self.named_parameters() if name.endswith((".b1", ".b2"))}
