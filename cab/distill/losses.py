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

    Args:
        bridges: phi, for every layer and direction.
        projections: the student's B and C, a tuple a layer with one entry a direction.
        targets: what K and Q are turned into before they are met.
        layer_map: g, the teacher layer of each student layer; it never goes back.
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
        self.layer_map = layer_map
        self.token_index = token_index
        self.mask = mask
        counts = [bridges.directions * layer_map.count(layer) for layer in range(max(layer_map) + 1)]
        self.key_weights = bridges.key.split(counts)
        self.query_weights = bridges.query.split(counts)
        self.losses: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Meet Q and K (batch, heads, tokens, head_dim) of one teacher layer."""
        students = [index for index, teacher in enumerate(self.layer_map) if teacher == layer]
        directions = [direction for index in students for direction in self.projections[index]]
        if directions:
            self._add([direction.B for direction in directions], self.key_weights[layer], self.targets.key(layer, key))
            self._add(
                [direction.C for direction in directions], self.query_weights[layer], self.targets.query(layer, query)
            )

    def _add(self, sources: list[Tensor], weights: BridgeWeights, target: Target) -> None:
        losses = bridge_mse_grouped(
            sources,
            *weights,
            target.value,
            mask=self.mask,
            token_index=self.token_index,
            target_mean=target.mean,
            target_rstd=target.rstd,
        )
        self.losses.append(losses.sum())

    def loss(self) -> Tensor:
        """The loss, 0-d float32, once all layers of the teacher have been met."""
        return torch.stack(self.losses).sum() / len(self.layer_map)
