"""How alike the attention of teacher and student are: the paper's figure 3."""

from __future__ import annotations

import torch
from torch import Tensor

from cab.distill.attention import student_rows, teacher_rows
from cab.distill.vision import VisionTask


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
    own, theirs = task.own_tokens, task.their_tokens
    found: list[Tensor] = []

    def compare(layer: int, query: Tensor, key: Tensor) -> None:
        for directions, teacher in zip(projections, task.layer_map, strict=True):
            if teacher != layer:
                continue
            ways = [(way.C[:, own].float(), way.B[:, own].float()) for way in directions]
            products = torch.zeros(3, len(images), device=images.device)
            for rows, of_teacher in teacher_rows(query, key, theirs):
                of_student, _ = student_rows(ways, rows)
                pairs = ((of_student, of_teacher), (of_student, of_student), (of_teacher, of_teacher))
                products += torch.stack([(one * other).sum((1, 2)) for one, other in pairs])
            found.append((products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-8)).mean())

    task.teacher(images, compare)
    return torch.stack(found)
