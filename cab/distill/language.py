"""Distillation of a language model."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cab.bridge import Bridges
from cab.distill.agreement import GradientAgreement
from cab.distill.losses import Alignment
from cab.distill.task import DistillationTask
from cab.distill.token_losses import IGNORED, Divergence, shared_vocabulary, token_losses
from cab.packing import document_starts
from cab.students.student import TokenStudent
from cab.teachers.huggingface import HuggingFaceTeacher


class LanguageTask(DistillationTask):
    """:class:`DistillationTask` on tokens, each of which the student matches with the teacher's one by one.

    Args beyond those of :class:`DistillationTask`:
        divergence: what takes the place of the KL.
        tokens: of the tokenizer; needed where the two heads differ, see :func:`shared_vocabulary`.
        chunk: tokens whose logits exist at a time.

    Raises:
        ValueError: also where student and teacher do not share a vocabulary.
    """

    student: TokenStudent
    teacher: HuggingFaceTeacher | None

    def __init__(
        self,
        student: TokenStudent,
        teacher: HuggingFaceTeacher | None = None,
        bridges: Bridges | None = None,
        *,
        divergence: Divergence | None = None,
        tokens: int | None = None,
        chunk: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(student, teacher, bridges, **options)
        self.divergence = divergence or Divergence()
        self.chunk = chunk
        own = student.vocab_size
        self.vocab_size = shared_vocabulary(own, own if teacher is None else teacher.vocab_size, tokens)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch through student, teacher and bridges.

        Args:
            input_ids: (batch, tokens).
            labels: (batch, tokens), ``input_ids`` with -100 where the prediction of a token does not count; by
                default wherever it is padding or the first of a packed document.
            attention_mask: (batch, tokens), 0 where a token is padding; None where there is none.
            position_ids: (batch, tokens), of packed documents, none of which sees another, neither in the student nor
                in the teacher; see :func:`cab.packing.document_starts`. There is no padding then.

        Returns:
            "loss", 0-d, and the terms that were computed, each a mean over the tokens that count, unweighted and
            detached: "kl", "ce", "align", and "align_layers", the alignment of each layer. The alignment counts all
            tokens but padding.
        """
        align, predict = self.alignment_weight > 0, not (self.training and self.aligns_alone)
        return self._weigh(self._terms(input_ids, labels, attention_mask, position_ids, align, predict))

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        return {**means, "perplexity": math.exp(min(means["ce"], 700.0))} if "ce" in means else means

    def _weight(self, inputs: dict[str, Tensor]) -> Tensor:
        """Predictions that count, of each sequence."""
        labels = inputs.get("labels", inputs["input_ids"])
        return (labels[:, 1:] != IGNORED).sum(1).float()

    def compare_gradients(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> GradientAgreement:
        """Norms and cosine of the gradients of the KL and of the alignment by the student's parameters."""
        return self._compare(self._terms(input_ids, labels, attention_mask, position_ids, align=True, predict=True))

    def _terms(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        align: bool,
        predict: bool,
    ) -> dict[str, Tensor]:
        """The unweighted terms of the loss: the alignment, and those of the predictions, where they are wanted."""
        mask = None if attention_mask is None else attention_mask.bool()
        if labels is None:
            labels = input_ids if mask is None else input_ids.masked_fill(~mask, IGNORED)
            if position_ids is not None:
                labels = labels.masked_fill(document_starts(position_ids), IGNORED)
        alignment = None
        if self.bridges is not None and align:
            hidden, projections = self.student.forward_with_projections(input_ids, attention_mask, position_ids)
            alignment = Alignment(self.bridges, projections, self.targets, self.layer_map, mask=mask)
        else:
            hidden = self.student(input_ids, attention_mask, position_ids)
        teacher, teacher_hidden = self.teacher, None
        if teacher is not None and (self.weights.kd or alignment is not None):
            teacher_hidden = teacher(input_ids, attention_mask, alignment, position_ids)
        kl, ce = token_losses(
            hidden,
            self.student.logits,
            labels,
            teacher_hidden=teacher_hidden,
            teacher_head=None if teacher is None else teacher.logits,
            divergence=self.divergence if self.weights.kd and predict else None,
            temperature=self.weights.temperature,
            ce=predict and (bool(self.weights.ce) or not self.training),
            vocab_size=self.vocab_size,
            chunk=self.chunk,
        )
        terms = {name: term for name, term in (("kl", kl), ("ce", ce)) if term is not None}
        if alignment is not None:
            terms |= {"align": alignment.loss(), "align_layers": alignment.layers()}
        return terms
