"""The two terms of the loss: KL on the logits, and the bridges' alignment of B with K and C with Q."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cab.bridge import Bridges, BridgeWeights
from cab.distill.targets import Target, TeacherTargets
from cab.students.student import Projections
from cab_kernels import bridge_mse_grouped


def distillation_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of softmax(logits / T), the mean over the batch, in float32.

    Args:
        student_logits, teacher_logits: (batch, classes).
        temperature: T. The factor T^2 keeps the gradient's size when T changes (arXiv:1503.02531, section 2).
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Alignment:
    """Adds up the alignment loss of one batch while the teacher runs: a callback for the teacher's layers.

    The student has run before; each teacher layer's K and Q meet all B and C that are mapped to that layer as soon as
    its attention has them, and can be freed when the call returns.

        L_align = mean over student layers l of  sum over directions of  MSE(phi_B(B), K_g(l)) + MSE(phi_C(C), Q_g(l))

    With a learned layer map every teacher layer takes the place of g(l) in turn, and the losses count by their shares,
    softmax(layer_logits)[l]: T times the work.

    Args:
        bridges: phi, for every Mamba layer and direction, and the learned layer map where there is one, a row for
            each Mamba layer.
        projections: the student's B and C, a tuple a layer with one entry a direction, none for a layer that keeps
            attention: it has a K and Q of its own, and its alignment is no part of the mean.
        targets: what K and Q are turned into before they are met.
        layer_map: g, the teacher layer of each student layer, those that keep attention among them; it never goes
            back. A learned one takes its place.
        token_index: (length,) the teacher token of each student token, -1 for none; None where they are the same.
        mask: (batch, length) bool, False where a token does not count; None where all count.

    Source: arXiv:2510.19266, section 3.2. There a layer has one direction; here the directions are summed.
    """

    def __init__(
        self,
        bridges: Bridges,
        projections: Sequence[Sequence[Projections]],
        targets: TeacherTargets,
        layer_map: Sequence[int],
        token_index: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.projections = projections
        self.targets = targets
        self.token_index = token_index
        self.mask = mask
        aligned = [index for index, directions in enumerate(projections) if directions]
        learned = bridges.layer_logits
        if learned is None:
            self.shares, turns = None, 1
            groups = [[index for index in aligned if layer_map[index] == layer] for layer in range(max(layer_map) + 1)]
        else:  # every teacher layer meets all bridges
            self.shares, turns = learned.float().softmax(dim=1), learned.shape[1]
            groups = [aligned]
        counts = [bridges.directions * len(group) for group in groups]
        self.students = groups * turns
        self.key_weights = bridges.key.split(counts) * turns
        self.query_weights = bridges.query.split(counts) * turns
        self.directions = bridges.directions
        # Of each teacher layer that has students, a number for each of its bridges.
        self.of_keys: list[Tensor] = []
        self.of_queries: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Meet Q and K (batch, heads, tokens, head_dim) of one teacher layer."""
        students = self.students[layer] if layer < len(self.students) else []
        directions = [direction for index in students for direction in self.projections[index]]
        if directions:
            sources = [direction.B for direction in directions], [direction.C for direction in directions]
            weights = self.key_weights[layer], self.query_weights[layer]
            targets = self.targets.key(layer, key, self.mask), self.targets.query(layer, query, self.mask)
            if _lie_alike(targets[0].value, targets[1].value):  # they share launches, where the bridges are small
                of_keys, of_queries = self._losses(sources, weights, targets).chunk(2)
            else:
                of_keys, of_queries = (
                    self._losses([source], [weight], [target])
                    for source, weight, target in zip(sources, weights, targets, strict=True)
                )
            self.of_keys.append(of_keys)
            self.of_queries.append(of_queries)

    def _losses(
        self, sources: Sequence[list[Tensor]], weights: Sequence[BridgeWeights], targets: Sequence[Target]
    ) -> Tensor:
        """The losses of all sources to one target, of all to the next, ..., of one width."""
        w1, b1, w2, b2 = zip(*weights, strict=True)
        if w1[0] is None:
            losses = map(self._linear_losses, sources, weights, targets)
            return torch.cat(list(losses))
        means = [target.mean for target in targets if target.mean is not None]
        rstds = [target.rstd for target in targets if target.rstd is not None]
        return bridge_mse_grouped(
            [source for group in sources for source in group],
            w1,
            b1,
            w2,
            b2,
            [target.value for target in targets],
            mask=self.mask,
            token_index=self.token_index,
            target_mean=torch.stack(means) if means else None,
            target_rstd=torch.stack(rstds) if rstds else None,
        )

    def _linear_losses(self, sources: list[Tensor], weights: BridgeWeights, target: Target) -> Tensor:
        """The losses of bridges without a hidden layer, in at least float32."""
        aim = target.value.transpose(1, 2).flatten(2) if target.value.dim() == 4 else target.value
        counted = torch.ones(sources[0].shape[:2], dtype=torch.bool, device=aim.device)
        if self.mask is not None:
            counted = counted & self.mask
        if self.token_index is not None:
            counted = counted & (self.token_index >= 0)
            aim = aim.index_select(1, self.token_index.clamp(min=0))
        compute = torch.promote_types(weights.w2.dtype, torch.float32)
        aim = aim.detach().to(compute)
        if target.mean is not None and target.rstd is not None:
            aim = (aim - target.mean) * target.rstd
        losses = []
        with torch.autocast(aim.device.type, enabled=False):
            for source, weight, bias in zip(sources, weights.w2.unbind(), weights.b2.unbind(), strict=True):
                residual = F.linear(source.to(compute), weight.to(compute), bias.to(compute)) - aim
                squares = residual.square().mean(dim=-1).masked_fill(~counted, 0)
                losses.append(squares.sum() / counted.sum().clamp(min=1))
        return torch.stack(losses)

    def layers(self) -> Tensor:
        """The loss of each Mamba layer, (layers,) float32, once all layers of the teacher have been met."""
        losses = (torch.cat(self.of_keys) + torch.cat(self.of_queries)).view(-1, self.directions).sum(1)
        return losses if self.shares is None else (self.shares.T * losses.view_as(self.shares.T)).sum(0)

    def loss(self) -> Tensor:
        """Their mean, 0-d."""
        return self.layers().mean()


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
