"""What the bridges aim at: a teacher's K and Q as they are, standardised, or through the published code's softmax."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import cab.processes as processes

TargetKind = Literal["raw", "standardised", "softmax"]


class Target(NamedTuple):
    """A target of the bridge loss; ``mean`` and ``rstd`` (width,), where given, standardise it as it is read."""

    value: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None


class RunningStatistics(nn.Module):
    """Mean and variance of each channel of each teacher layer, over all tokens seen in training so far.

    The teacher is frozen and its inputs keep their distribution, so that every token counts alike: there is no
    momentum to choose. The buffers are saved and resumed with the module that holds this one.

    Args:
        layers: of the teacher.
        width: channels, heads * head_dim.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(layers, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("spread", torch.zeros(layers, width))  # sum of squared differences from the mean

    @torch.no_grad()
    def update(self, layer: int, value: Tensor, mask: Tensor | None = None) -> None:
        """Take in K or Q (batch, heads, tokens, head_dim) of one layer, where ``mask`` (batch, tokens) is True.

        Two sets of tokens are joined without loss of precision (Chan, Golub and LeVeque, 1979).
        """
        if mask is None:
            variance, mean = torch.var_mean(value.float(), dim=(0, 2), correction=0)
            mean, tokens = mean.flatten(), self.count.new_full((), value.shape[0] * value.shape[2])
            spread = tokens * variance.flatten()
        else:
            tokens = mask.sum().double()
            rows = value.transpose(1, 2).flatten(2).float().masked_fill(~mask.unsqueeze(-1), 0)
            mean = (rows.sum((0, 1)) / tokens.clamp(min=1)).float()
            spread = (rows - mean).masked_fill(~mask.unsqueeze(-1), 0).square().sum((0, 1))
        if processes.count() > 1:  # they share a batch: each takes in all of it
            share = processes.mean(tokens)
            whole = (processes.mean(tokens * mean) / share.clamp(min=1)).float()
            spread = processes.mean(spread + tokens.float() * (mean - whole).square()) * processes.count()
            mean, tokens = whole, share * processes.count()
        before = self.count[layer].clone()
        share = (tokens / (before + tokens).clamp(min=1)).float()
        difference = mean - self.mean[layer]
        self.count[layer] += tokens
        self.mean[layer] += share * difference
        self.spread[layer] += spread + before.float() * share * difference.square()

    def standardise(self, layer: int, value: Tensor) -> Target:
        """``value`` with the statistics of its layer."""
        variance = self.spread[layer] / self.count[layer].clamp_min(1).float()
        return Target(value, self.mean[layer].clone(), (variance + 1e-6).rsqrt())


class TeacherTargets(nn.Module):
    """Turns a teacher layer's K and Q into targets.

    Args:
        kind: "raw": K and Q as they are (arXiv:2510.19266, section 3.2). "standardised": each channel with mean 0 and
            variance 1. "softmax": K over the tokens, Q over all channels, as the published code does.
        layers: of the teacher.
        key_width, query_width: heads * head_dim of K and of Q.

    Raises:
        ValueError: the kind is unknown.
    """

    def __init__(self, kind: TargetKind, layers: int, key_width: int, query_width: int) -> None:
        super().__init__()
        if kind not in ("raw", "standardised", "softmax"):
            raise ValueError(f"TeacherTargets: expected kind 'raw', 'standardised' or 'softmax', got {kind!r}")
        self.kind = kind
        standardised = kind == "standardised"
        self.of_key = RunningStatistics(layers, key_width) if standardised else None
        self.of_query = RunningStatistics(layers, query_width) if standardised else None

    def key(self, layer: int, key: Tensor, mask: Tensor | None = None) -> Target:
        """The target for B, from K (batch, heads, tokens, head_dim), of which ``mask`` (batch, tokens) counts."""
        if self.kind == "softmax":
            counted = key if mask is None else key.masked_fill(~mask[:, None, :, None], -torch.inf)
            return Target(counted.softmax(dim=-2))
        return self._target(self.of_key, layer, key, mask)

    def query(self, layer: int, query: Tensor, mask: Tensor | None = None) -> Target:
        """The target for C, from Q (batch, heads, tokens, head_dim), of which ``mask`` (batch, tokens) counts."""
        if self.kind == "softmax":
            return Target(query.transpose(1, 2).flatten(2).softmax(dim=-1))
        return self._target(self.of_query, layer, query, mask)

    def _target(self, statistics: RunningStatistics | None, layer: int, value: Tensor, mask: Tensor | None) -> Target:
        if statistics is None:
            return Target(value)
        if self.training:
            statistics.update(layer, value, mask)
        return statistics.standardise(layer, value)
