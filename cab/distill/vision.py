"""Distillation of an image classifier."""

from __future__ import annotations

from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor

from cab.bridge import Bridges
from cab.distill.agreement import GradientAgreement
from cab.distill.attention import AttentionAlignment
from cab.distill.losses import Alignment, distillation_kl
from cab.distill.task import DistillationTask
from cab.images import resized
from cab.students.student import ImageStudent, Projections
from cab.teachers.timm import TimmTeacher
from cab.token_map import token_map


class VisionTask(DistillationTask):
    """:class:`DistillationTask` on images, which each model sees normalised with its own statistics.

    Args beyond those of :class:`DistillationTask`:
        attention: align attention matrices, see :class:`cab.distill.attention.AttentionAlignment`, in the place of B
            and C through bridges.
        student_size: the height and width to which the student's images are resized; None: it takes them as they are.

    Raises:
        ValueError: also for ``attention`` beside bridges, or without a teacher.
    """

    student: ImageStudent
    teacher: TimmTeacher | None
    student_mean: Tensor
    student_std: Tensor
    token_index: Tensor
    own_tokens: Tensor
    their_tokens: Tensor

    def __init__(
        self,
        student: ImageStudent,
        teacher: TimmTeacher | None = None,
        bridges: Bridges | None = None,
        *,
        attention: bool = False,
        student_size: tuple[int, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, bridges, **options)
        self.student_size = student_size
        if attention and (bridges is not None or teacher is None):
            raise ValueError(
                "VisionTask: expected a teacher and no bridges for the attention's alignment, got "
                + ("no teacher" if teacher is None else "bridges")
            )
        self.attention = attention
        data = timm.data.resolve_data_config(model=student)
        self.register_buffer("student_mean", torch.tensor(data["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("student_std", torch.tensor(data["std"]).view(-1, 1, 1), persistent=False)
        if teacher is not None:
            tokens = torch.tensor(token_map(student.token_layout, teacher.token_layout), dtype=torch.int32)
            self.register_buffer("token_index", tokens, persistent=False)
            own = (tokens >= 0).nonzero().flatten()
            self.register_buffer("own_tokens", own, persistent=False)
            self.register_buffer("their_tokens", tokens[own].long(), persistent=False)

    @property
    def aligns(self) -> bool:
        return self.attention or super().aligns

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """One batch through student, teacher and bridges.

        Args:
            images: (batch, channels, height, width), values in [0, 1].
            labels: (batch,) class indices, or (batch, classes) probabilities; the cross-entropy needs them.

        Returns:
            "loss", 0-d; "logits" of the student, (batch, classes); and the terms that were computed, unweighted and
            detached: "kl", "ce", "align", and "align_layers", the alignment of each layer.
        """
        logits, terms = self._terms(images, labels, align=self.alignment_weight > 0)
        return {**self._weigh(terms), "logits": logits}

    def measures(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, labels = outputs["logits"], inputs["labels"]
        best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
        correct = {"accuracy": best[:, 0].float(), "top5": best.any(dim=-1).float()}
        return {**correct, **super().measures(inputs, outputs)}

    def _weight(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(inputs["images"]), device=inputs["images"].device)

    def compare_gradients(self, images: Tensor, labels: Tensor | None = None) -> GradientAgreement:
        """Norms and cosine of the gradients of the KL and of the alignment by the student's parameters."""
        return self._compare(self._terms(images, None, align=True)[1])

    def _terms(self, images: Tensor, labels: Tensor | None, align: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits and the unweighted terms of the loss."""
        alignment = None
        fitting = images if self.student_size is None else resized(images, self.student_size)
        normalised = (fitting - self.student_mean) / self.student_std
        if self.aligns and align:
            logits, projections = self.student.forward_with_projections(normalised)
            alignment = self._alignment(projections)
        else:
            logits = self.student(normalised)
        terms: dict[str, Tensor] = {}
        if self.teacher is not None and (self.weights.kd or alignment is not None):
            teacher_logits = self.teacher(images, alignment)
            terms["kl"] = distillation_kl(logits, teacher_logits, self.weights.temperature)
        if labels is not None:
            terms["ce"] = F.cross_entropy(logits.float(), labels)
        if alignment is not None:
            terms |= {"align": alignment.loss(), "align_layers": alignment.layers()}
        return logits, terms

    def _alignment(self, projections: list[tuple[Projections, ...]]) -> Alignment | AttentionAlignment:
        if self.bridges is None:
            return AttentionAlignment(projections, self.layer_map, self.own_tokens, self.their_tokens)
        return Alignment(self.bridges, projections, self.targets, self.layer_map, self.token_index)
