"""Does the alignment still help? The agreement of its gradient with the KL term's, and a weight that follows it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import cab.processes as processes


class GradientAgreement(NamedTuple):
    """The gradients of the two terms with respect to the student's parameters: 0-d tensors.

    Attributes:
        kl_norm, align_norm: their Euclidean norms, unweighted.
        cosine: of the angle between them. Above 0, a small step down the alignment loss lowers the KL as well.
    """

    kl_norm: Tensor
    align_norm: Tensor
    cosine: Tensor


def gradient_agreement(kl: Tensor, align: Tensor, parameters: list[nn.Parameter]) -> GradientAgreement:
    """Compare the gradients of two losses of one forward pass; costs two backward passes and leaves ``.grad`` alone.

    Where several processes share a batch, the gradients are those of the whole batch, in each of them.

    Args:
        kl, align: 0-d, with their graph, which is kept.
        parameters: what both are differentiated by; one that a loss does not reach counts as zero there.
    """
    of_kl, of_align = (
        processes.average(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True))
        for loss in (kl, align)
    )

    def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
        return torch.stack([(a.float() * b.float()).sum() for a, b in zip(left, right, strict=True)]).sum()

    kl_norm, align_norm = dot(of_kl, of_kl).sqrt(), dot(of_align, of_align).sqrt()
    cosine = dot(of_kl, of_align) / (kl_norm * align_norm).clamp_min(torch.finfo(torch.float32).tiny)
    return GradientAgreement(kl_norm, align_norm, cosine)


class AdaptiveTrust(nn.Module):
    """The share of its weight that the alignment keeps: its present agreement with the KL term over the best so far.

    Fed with cosines at even intervals of a run, it holds their mean over about a tenth of the run. While that mean is
    at its highest the alignment keeps its whole weight; as the two gradients drift apart the weight falls in
    proportion; where the alignment works against the KL it is nothing, and comes back if they agree again. The scale
    of the cosines, which depends on model and data, cancels. Its state is saved and resumed.

    An auxiliary loss helps as far as its gradient agrees with the main one's: arXiv:1812.02224.
    """

    OBSERVATIONS = 100  # a run, at even intervals
    HORIZON = 10  # observations that the mean looks back on

    total: Tensor
    weight: Tensor
    best: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("best", torch.zeros((), dtype=torch.float64))
        self._value = 1.0  # on the host: a step reads it without waiting for the GPU
        self.register_load_state_dict_post_hook(lambda module, _: module._settle())

    @staticmethod
    def is_due(step: int, total_steps: int) -> bool:
        """Whether to observe at ``step``, counted from 0, of a run of ``total_steps``."""
        return step % max(1, total_steps // AdaptiveTrust.OBSERVATIONS) == 0

    @torch.no_grad()
    def observe(self, cosine: Tensor | float) -> None:
        """Take in one cosine of the terms' gradients."""
        keep = 1 - 1 / self.HORIZON
        self.total.mul_(keep).add_(cosine)
        self.weight.mul_(keep).add_(1)
        self.best.copy_(torch.maximum(self.best, self.total / self.weight))
        self._settle()

    def value(self) -> float:
        """The trust, from 0 to 1; 1 before the first observation."""
        return self._value

    def _settle(self) -> None:
        total, weight, best = torch.stack((self.total, self.weight, self.best)).tolist()
        self._value = 1.0 if not weight else 0.0 if not best else min(max(total / weight / best, 0.0), 1.0)
