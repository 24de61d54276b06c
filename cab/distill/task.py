"""The training task: one module that holds all that is trained, and the only place where losses are weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm.data
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cab.bridge import Bridges
from cab.distill.agreement import AdaptiveTrust, GradientAgreement, gradient_agreement
from cab.distill.losses import Alignment, distillation_kl
from cab.distill.schedule import AlignmentSchedule
from cab.distill.targets import TargetKind, TeacherTargets
from cab.layer_map import proportional
from cab.students.student import Student
from cab.teachers.timm import TimmTeacher
from cab.token_map import token_map


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms beside the alignment, whose weight is a schedule.

    Attributes:
        kd: of KL(teacher || student) on the logits.
        ce: of the cross-entropy with the labels.
        temperature: of the KL.
    """

    kd: float = 1.0
    ce: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kd", "ce"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"LossWeights: expected {name} of at least 0, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"LossWeights: expected temperature above 0, got {self.temperature}")


class DistillationTask(nn.Module):
    """Student and bridges as one module, so that one optimiser, one checkpoint and one DDP wrapper see both.

        loss = kd * KL(teacher || student) + ce * CE + weight(step) * L_align

    The teacher moves between devices with the task, but is no part of its parameters or of its checkpoints.

    Args:
        student: sees images normalised with its own statistics.
        teacher: None for a task without one (cross-entropy alone).
        bridges: None for a task without alignment.
        weights: of the terms beside the alignment.
        schedule: the weight of the alignment over the run.
        targets: what the bridges aim at, see :class:`cab.distill.targets.TeacherTargets`.
        layer_map: the teacher layer of each student layer; by default floor(l * T / L).

    Raises:
        ValueError: bridges or a KL without a teacher; bridges or a layer map that do not fit the models.
    """

    student: Student
    teacher: TimmTeacher | None
    bridges: Bridges | None
    _alignment_weight: Tensor
    student_mean: Tensor
    student_std: Tensor
    token_index: Tensor

    def __init__(
        self,
        student: Student,
        teacher: TimmTeacher | None = None,
        bridges: Bridges | None = None,
        *,
        weights: LossWeights | None = None,
        schedule: AlignmentSchedule | None = None,
        targets: TargetKind = "raw",
        layer_map: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.bridges = bridges
        self.weights = weights or LossWeights()
        self.schedule = schedule or AlignmentSchedule()
        self.trust = AdaptiveTrust() if self.schedule.kind == "adaptive" else None
        self.alignment_weight = self.schedule.weight
        # The same number where the loss is computed, so that a captured step follows it.
        self.register_buffer("_alignment_weight", torch.tensor(self.schedule.weight), persistent=False)
        self.__dict__["teacher"] = teacher  # past nn.Module's registration: neither trained nor saved
        data = timm.data.resolve_data_config(model=student)
        self.register_buffer("student_mean", torch.tensor(data["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("student_std", torch.tensor(data["std"]).view(-1, 1, 1), persistent=False)
        if teacher is None:
            if bridges is not None or self.weights.kd:
                raise ValueError("DistillationTask: expected a teacher for bridges or a KL term, got None")
            return
        self.layer_map = list(layer_map or proportional(len(student.layers), teacher.num_layers))
        tokens = torch.tensor(token_map(student.token_layout, teacher.token_layout), dtype=torch.int32)
        self.register_buffer("token_index", tokens, persistent=False)
        self.targets = TeacherTargets(targets, teacher.num_layers, teacher.key_width, teacher.query_width)
        self._check(student, teacher)

    def _check(self, student: Student, teacher: TimmTeacher) -> None:
        layers = len(student.layers)
        inside = all(0 <= layer < teacher.num_layers for layer in self.layer_map)
        if len(self.layer_map) != layers or not inside or self.layer_map != sorted(self.layer_map):
            raise ValueError(
                f"DistillationTask: expected a layer map of {layers} teacher layers below {teacher.num_layers} "
                f"that never goes back, got {self.layer_map}"
            )
        if self.bridges is None:
            return
        expected = (layers, student.d_state, teacher.key_width, teacher.query_width)
        got = (
            self.bridges.layers,
            self.bridges.key.w1.shape[-1],
            self.bridges.key.w2.shape[1],
            self.bridges.query.w2.shape[1],
        )
        if expected != got:
            raise ValueError(
                "DistillationTask: expected bridges for (layers, d_state, key width, query width) = "
                f"{expected}, got {got}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationTask:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def no_weight_decay(self) -> set[str]:
        """The parameters that must not be decayed, by their names in the task."""
        spared = {f"student.{name}" for name in self.student.no_weight_decay()}
        if self.bridges is not None:
            spared |= {f"bridges.{name}" for name in self.bridges.no_weight_decay()}
        return spared

    def advance(self, step: int, total_steps: int) -> None:
        """Set the alignment's weight for ``step``, counted from 0, of a run of ``total_steps``."""
        trust = 1.0 if self.trust is None else self.trust.value()
        self.alignment_weight = self.schedule.weight_at(step, total_steps, trust)
        self._alignment_weight.fill_(self.alignment_weight)

    def compare_gradients(self, images: Tensor) -> GradientAgreement:
        """Norms and cosine of the gradients of the KL and of the alignment by the student's parameters."""
        _, terms = self._terms(images, None, align=True)
        return gradient_agreement(terms["kl"], terms["align"], list(self.student.parameters()))

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """One batch through student, teacher and bridges.

        Args:
            images: (batch, channels, height, width), values in [0, 1].
            labels: (batch,) class indices; the cross-entropy needs them.

        Returns:
            "loss", 0-d; "logits" of the student, (batch, classes); and the terms that were computed, unweighted and
            detached: "kl", "ce", "align".
        """
        logits, terms = self._terms(images, labels, align=self.alignment_weight > 0)
        weights = {"kl": self.weights.kd, "ce": self.weights.ce}
        weighted = [weights[name] * term for name, term in terms.items() if weights.get(name)]
        if "align" in terms:
            weighted.append(self._alignment_weight * terms["align"])
        loss = torch.stack(weighted).sum()
        return {"loss": loss, "logits": logits, **{name: term.detach() for name, term in terms.items()}}

    def _terms(self, images: Tensor, labels: Tensor | None, align: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits and the unweighted terms of the loss."""
        alignment = None
        normalised = (images - self.student_mean) / self.student_std
        if self.bridges is not None and align:
            logits, projections = self.student.forward_with_projections(normalised)
            alignment = Alignment(self.bridges, projections, self.targets, self.layer_map, self.token_index)
        else:
            logits = self.student(normalised)
        terms: dict[str, Tensor] = {}
        if self.teacher is not None and (self.weights.kd or alignment is not None):
            teacher_logits = self.teacher(images, alignment)
            terms["kl"] = distillation_kl(logits, teacher_logits, self.weights.temperature)
        if labels is not None:
            terms["ce"] = F.cross_entropy(logits.float(), labels)
        if alignment is not None:
            terms["align"] = alignment.loss()
        return logits, terms
