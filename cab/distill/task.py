"""The training task: one module that holds all that is trained, and the only place where losses are weighed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cab.bridge import Bridges
from cab.distill.agreement import AdaptiveTrust, GradientAgreement, gradient_agreement
from cab.distill.schedule import AlignmentSchedule
from cab.distill.targets import TargetKind, TeacherTargets
from cab.layer_map import proportional
from cab.students.student import Student
from cab.teachers.teacher import Teacher


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

    In stages, see :class:`cab.distill.schedule.AlignmentSchedule`, KL and CE do not count while the alignment does.

    The teacher moves between devices with the task, unless it stays, but is no part of its parameters or of its
    checkpoints. What a batch is, and how the terms are computed on it, is a subclass's.

    Args:
        student: a Mamba model.
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
    teacher: Teacher | None
    bridges: Bridges | None
    _alignment_weight: Tensor

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None = None,
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
        if teacher is None:
            if bridges is not None or self.weights.kd:
                raise ValueError(f"{type(self).__name__}: expected a teacher for bridges or a KL term, got None")
            return
        self.layer_map = list(layer_map or proportional(student.num_layers, teacher.num_layers))
        self.targets = TeacherTargets(targets, teacher.num_layers, teacher.key_width, teacher.query_width)
        self._check(student, teacher)

    def _check(self, student: Student, teacher: Teacher) -> None:
        layers = student.num_layers
        inside = all(0 <= layer < teacher.num_layers for layer in self.layer_map)
        if len(self.layer_map) != layers or not inside or self.layer_map != sorted(self.layer_map):
            raise ValueError(
                f"{type(self).__name__}: expected a layer map of {layers} teacher layers below {teacher.num_layers} "
                f"that never goes back, got {self.layer_map}"
            )
        if self.bridges is None:
            return
        expected = (student.mamba_layers, student.d_state, teacher.key_width, teacher.query_width)
        bridges = self.bridges
        if bridges.layer_logits is not None and bridges.layer_logits.shape[1] != teacher.num_layers:
            raise ValueError(
                f"{type(self).__name__}: expected a learned layer map over {teacher.num_layers} teacher layers, got "
                f"{bridges.layer_logits.shape[1]}"
            )
        got = (bridges.layers, bridges.d_state, bridges.key_width, bridges.query_width)
        if expected != got:
            raise ValueError(
                f"{type(self).__name__}: expected bridges for (layers, d_state, key width, query width) = "
                f"{expected}, got {got}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationTask:
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def aligns(self) -> bool:
        """Whether there is an alignment, of whatever weight."""
        return self.bridges is not None

    @property
    def last_aligned(self) -> int | None:
        """The place of the last of the student's blocks that the alignment reaches; None without one."""
        return self.student.last_mamba if self.aligns else None

    @property
    def aligns_alone(self) -> bool:
        """Whether the alignment is the whole loss at this step."""
        return self.schedule.kind == "stages" and self.aligns and self.alignment_weight > 0

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

    def measures(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an evaluation learns from a batch: for each sample its "weight" and a value of every measure."""
        weight = self._weight(inputs)
        terms = [name for name in ("kl", "ce", "align") if name in outputs]
        return {"weight": weight, **{name: outputs[name].float().expand_as(weight) for name in terms}}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The weighted means of :meth:`measures` over the evaluation, and what follows from them."""
        return means

    def _weight(self, inputs: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def _compare(self, terms: dict[str, Tensor]) -> GradientAgreement:
        """Norms and cosine of the gradients of the KL and of the alignment by the student's parameters."""
        return gradient_agreement(terms["kl"], terms["align"], list(self.student.parameters()))

    def _weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The "loss", the weighted sum of "kl", "ce" and "align", and those that there are, unweighted and detached."""
        weights = {} if self.aligns_alone else {"kl": self.weights.kd, "ce": self.weights.ce}
        weighted = [weights[name] * term for name, term in terms.items() if weights.get(name)]
        if "align" in terms:
            weighted.append(self._alignment_weight * terms["align"])
        return {"loss": torch.stack(weighted).sum(), **{name: term.detach() for name, term in terms.items()}}
