"""The control for the bridges: attention matrices, the student's C B^T and the teacher's softmax(Q K^T), row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cab.students.student import Projections

ROWS = 64  # of the matrices that exist at a time


class AttentionAlignment:
    """Adds up the distance of attention matrices of one batch while the teacher runs: a callback for its layers.

        L_align = mean over student layers l and tokens t of  sum over tokens s of  (S_l[t, s] - A_g(l)[t, s])^2

    A is the teacher's softmax(Q K^T / sqrt(head_dim)), the mean over its heads. S is what the student's scan is where
    nothing decays: C B^T, of which the forward direction sees the tokens up to its own and the backward direction those
    from its own on; the two are added. No more than :data:`ROWS` rows of a matrix exist at a time, and for backward
    only the gradients of B and C are kept, which forward has computed on the way.

    Args:
        projections: the student's B and C, a tuple a layer with one entry a direction.
        layer_map: g, the teacher layer of each student layer; it never goes back.
        own, theirs: (compared,) the student's and the teacher's index of each token that both have, in the student's
            order.

    Source: the matrix orientation of arXiv:2408.10189, there head by head; a channel of Mamba has no head to match.
    """

    def __init__(
        self, projections: Sequence[Sequence[Projections]], layer_map: Sequence[int], own: Tensor, theirs: Tensor
    ) -> None:
        self.projections = projections
        self.layer_map = layer_map
        self.own = own
        self.theirs = theirs
        self.of_layers: list[Tensor] = []  # (layers,) of each teacher layer that has students

    def __call__(self, layer: int, query: Tensor, key: Tensor) -> None:
        """Meet Q and K (batch, heads, tokens, head_dim) of one teacher layer."""
        students = [ways for ways, teacher in zip(self.projections, self.layer_map, strict=True) if teacher == layer]
        if students:
            sources = [of_tokens[:, self.own] for ways in students for way in ways for of_tokens in (way.C, way.B)]
            self.of_layers.append(_Distance.apply(query, key, self.theirs, len(students[0]), *sources))

    def layers(self) -> Tensor:
        """The loss of each student layer, (layers,) float32, once all layers of the teacher have been met."""
        return torch.cat(self.of_layers)

    def loss(self) -> Tensor:
        """Their mean, 0-d."""
        return self.layers().mean()


def teacher_rows(query: Tensor, key: Tensor, theirs: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and the rows (batch, rows, compared) of softmax(Q K^T / sqrt(head_dim)), the mean over the heads.

    Args:
        query, key: (batch, heads, tokens, head_dim); with grouped-query attention K has fewer heads.
        theirs: (compared,) the tokens whose rows and columns are wanted.
    """
    compute = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).to(compute).transpose(-1, -2)
    for start in range(0, len(theirs), ROWS):
        rows = slice(start, start + ROWS)
        scores = query[:, :, theirs[rows]].to(compute) @ key / query.shape[-1] ** 0.5
        yield rows, scores.softmax(dim=-1).mean(dim=1)[:, :, theirs]


def student_rows(directions: Sequence[tuple[Tensor, Tensor]], rows: slice) -> tuple[Tensor, list[Tensor]]:
    """The rows (batch, rows, tokens) of C B^T, and for each direction the places (rows, tokens) that it sees.

    Args:
        directions: C and B (batch, tokens, d_state) of one layer, for each direction.
        rows: which.
    """
    places = torch.arange(directions[0][0].shape[1], device=directions[0][0].device)
    sees = [places <= places[rows, None], places >= places[rows, None]][: len(directions)]
    products = (C[:, rows] @ B.transpose(1, 2) * seen for (C, B), seen in zip(directions, sees, strict=True))
    return torch.stack(list(products)).sum(0), sees


class _Distance(torch.autograd.Function):
    """The loss of some student layers with one teacher layer, (students,); nothing reaches Q and K."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, theirs: Tensor, directions: int, *sources: Tensor) -> Tensor:
        compute = torch.promote_types(sources[0].dtype, torch.float32)
        wide = [source.to(compute) for source in sources]
        pairs = list(zip(wide[::2], wide[1::2], strict=True))
        students = [pairs[first : first + directions] for first in range(0, len(pairs), directions)]
        gradients = [(torch.zeros_like(C), torch.zeros_like(B)) for C, B in pairs]
        losses = wide[0].new_zeros(len(students))
        scale = 1 / (len(query) * len(theirs))
        with torch.autocast(query.device.type, enabled=False):
            for rows, aim in teacher_rows(query, key, theirs):
                for index, student in enumerate(students):
                    product, sees = student_rows(student, rows)
                    residual = product - aim
                    losses[index] += scale * residual.square().sum()
                    of_student = gradients[index * directions : (index + 1) * directions]
                    for (C, B), seen, (dC, dB) in zip(student, sees, of_student, strict=True):
                        slope = 2 * scale * residual * seen
                        dC[:, rows] += slope @ B
                        dB += slope.transpose(1, 2) @ C[:, rows]
        flat = (gradient for pair in gradients for gradient in pair)
        ctx.save_for_backward(*(gradient.to(source.dtype) for gradient, source in zip(flat, sources, strict=True)))
        ctx.each = 2 * directions
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            gradient * dlosses[index // ctx.each].to(gradient.dtype) for index, gradient in enumerate(ctx.saved_tensors)
        )
        return (None, None, None, None, *gradients)
