"""The losses of a language model against its teacher and against the text, a part of the tokens at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DivergenceKind = Literal["forward", "reverse", "jsd"]

IGNORED = -100  # the label of a token that does not count, as everywhere in PyTorch
MOST_PADDING = 1024  # rows of a head beyond its tokenizer's tokens; published models have up to 943


@dataclass(frozen=True)
class Divergence:
    """How far the student's distribution of the next token is from the teacher's.

    Attributes:
        kind: "forward", KL(teacher || student); "reverse", KL(student || teacher); "jsd", the generalised
            Jensen-Shannon divergence: beta KL(teacher || m) + (1 - beta) KL(student || m) for
            m = beta teacher + (1 - beta) student.
        beta: of "jsd", in (0, 1).
        top_k: compare the teacher's k most likely tokens one by one and all others as one; None compares all.

    Source: arXiv:2306.13649, section 2.
    """

    kind: DivergenceKind = "forward"
    beta: float = 0.5
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("forward", "reverse", "jsd"):
            raise ValueError(f"Divergence: expected kind 'forward', 'reverse' or 'jsd', got {self.kind!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"Divergence: expected beta in (0, 1), got {self.beta}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Divergence: expected top_k of at least 1, got {self.top_k}")

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """T^2 times the divergence of softmax(logits / T), for each row of (tokens, vocabulary); (tokens,).

        The factor T^2 keeps the gradient's size when the temperature T changes (arXiv:1503.02531, section 2).
        """
        student = F.log_softmax(student_logits / temperature, dim=-1)
        teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
        if self.top_k is not None and self.top_k < teacher.shape[-1]:
            likely = teacher.topk(self.top_k, dim=-1).indices
            student, teacher = _with_rest(student, likely), _with_rest(teacher, likely)
        return temperature**2 * self._of_logs(student, teacher)

    def _of_logs(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.kind == "forward":
            return _kl(teacher, student)
        if self.kind == "reverse":
            return _kl(student, teacher)
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        return self.beta * _kl(teacher, mixture) + (1 - self.beta) * _kl(student, mixture)


class TokenLosses(NamedTuple):
    """Means over the tokens that count, 0-d float32; None where it was not asked for."""

    kl: Tensor | None
    ce: Tensor | None


def token_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Callable[[Tensor], Tensor] | None = None,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    ce: bool = True,
    vocab_size: int | None = None,
    chunk: int = 1024,
) -> TokenLosses:
    """Divergence from the teacher and cross-entropy with the next token, as means over the tokens that count.

    Position t predicts token t + 1 and counts where ``labels[t + 1]`` is not -100. The heads run on ``chunk`` tokens at
    a time, and once more in the backward pass: logits of all tokens never exist. Everything behind the heads is float32
    at least. Where nothing counts, the means are 0.

    Args:
        hidden: (batch, tokens, width), the student's last hidden states.
        head: makes logits (..., vocabulary) of them.
        labels: (batch, tokens), the tokens themselves, -100 for padding and what else is not learnt.
        teacher_hidden, teacher_head: the same of the teacher; they get no gradient.
        divergence: from the teacher; None leaves it out.
        temperature: of the divergence.
        ce: whether to compute the cross-entropy.
        vocab_size: logits that count, the first ones; None for all.
        chunk: tokens at a time.
    """
    if divergence is None and not ce:
        return TokenLosses(None, None)
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = [hidden.flatten(0, 1), targets]
    if divergence is not None and teacher_hidden is not None:
        rows.append(teacher_hidden.flatten(0, 1))

    def sums(hidden: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None) -> Tensor:
        logits = _wide(head(hidden)[:, :vocab_size])
        of_teacher = of_text = logits.new_zeros(())
        if divergence is not None and teacher_hidden is not None and teacher_head is not None:
            with torch.no_grad():
                teacher_logits = _wide(teacher_head(teacher_hidden)[:, :vocab_size])
            # Selected, not multiplied: what does not count may be anything.
            of_tokens = divergence(logits, teacher_logits, temperature)
            of_teacher = of_tokens.masked_fill(targets == IGNORED, 0).sum()
        if ce:
            of_text = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return torch.stack((of_teacher, of_text))

    parts = zip(*(part.split(chunk) for part in rows), strict=True)
    totals = [checkpoint(sums, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    means = torch.stack(totals).sum(0) / (targets != IGNORED).sum().clamp(min=1)
    return TokenLosses(means[0] if len(rows) == 3 else None, means[1] if ce else None)


def shared_vocabulary(student: int, teacher: int, tokens: int | None = None) -> int:
    """The number of tokens that both models know, where their heads differ by padding alone.

    Args:
        student, teacher: logits of a token on each side.
        tokens: of the tokenizer; where it is not known, both sides must have the same number of logits.

    Raises:
        ValueError: the vocabularies differ by more than padding.
    """
    if tokens is None:
        if student == teacher:
            return student
        reason = "and no tokenizer is known whose tokens both would share"
    else:
        if all(0 <= logits - tokens < MOST_PADDING for logits in (student, teacher)):
            return tokens
        reason = f"for a tokenizer of {tokens} tokens: they differ by more than padding"
    raise ValueError(
        f"shared_vocabulary: expected student and teacher to share a vocabulary, got {student} logits of the student "
        f"and {teacher} of the teacher, {reason}"
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, along the last axis."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def _with_rest(log_probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of the chosen tokens, and of all others together."""
    rest = log_probabilities.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((log_probabilities.gather(-1, chosen), rest), dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
