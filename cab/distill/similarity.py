"""How alike the attention of teacher and student are: the paper's figure 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cab.distill.vision import VisionTask
from cab.students.student import Projections


@torch.no_grad()
def attention_similarity(task: VisionTask, images: Tensor) -> Tensor:
    """Cosine of the attention maps of each student layer and its teacher layer, (layers,), the mean over the images.

    The teacher's map is softmax(Q K^T / sqrt(head_dim)), the mean over its heads. The student's is what its scan is
    where nothing decays, linear attention: C B^T, of which the forward direction sees the tokens up to its own and the
    backward direction those from its own on; the two are added. Only tokens that both models have are compared.

    Args:
        task: with a teacher; needs no bridges.
        images: (batch, channels, height, width), values in [0, 1].

    Source: arXiv:2510.19266, figure 3.
    """
    if task.teacher is None:
        raise ValueError("attention_similarity: expected a task with a teacher, got none")
    _, projections = task.student.forward_with_projections((images - task.student_mean) / task.student_std)
    own = (task.token_index >= 0).nonzero().flatten()
    theirs = task.token_index[own].long()
    found: list[Tensor] = []

    def compare(layer: int, query: Tensor, key: Tensor) -> None:
        students = [index for index, teacher in enumerate(task.layer_map) if teacher == layer]
        if not students:
            return
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query.float() @ key.float().transpose(-1, -2) / query.shape[-1] ** 0.5
        of_teacher = scores.softmax(dim=-1).mean(dim=1)[:, theirs][:, :, theirs]
        for index in students:
            of_student = linear_attention(projections[index])[:, own][:, :, own]
            found.append(F.cosine_similarity(of_student.flatten(1), of_teacher.flatten(1)).mean())

    task.teacher(images, compare)
    return torch.stack(found)


def linear_attention(directions: Sequence[Projections]) -> Tensor:
    """C B^T (batch, length, length) of a layer; each direction sees its side of the diagonal."""
    forward, *backward = (direction.C.float() @ direction.B.float().transpose(1, 2) for direction in directions)
    return forward.tril() + sum(scores.triu() for scores in backward)
