"""Which teacher token each student token is matched with, wherever class tokens and registers stand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of an image stand in a model's sequence.

    Attributes:
        grid: rows and columns of patches.
        cls: index of the class token, or None where there is none. Other extra tokens are not listed: nothing is
            matched with a register or a distillation token.
        patches: index of each patch token, row by row.
    """

    grid: tuple[int, int]
    cls: int | None
    patches: tuple[int, ...]

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if len(self.patches) != rows * columns:
            raise ValueError(f"TokenLayout: expected {rows} x {columns} patches, got {len(self.patches)}")


def token_map(student: TokenLayout, teacher: TokenLayout) -> list[int]:
    """For each token of the student's sequence the index of its counterpart in the teacher's, -1 where there is none.

    Patches are matched by place. Where the grids differ, a student patch takes the teacher patch that holds its centre.
    """
    length = max(student.patches + (student.cls or 0,)) + 1
    matched = [-1] * length
    if student.cls is not None and teacher.cls is not None:
        matched[student.cls] = teacher.cls
    (rows, columns), (teacher_rows, teacher_columns) = student.grid, teacher.grid
    for place, token in enumerate(student.patches):
        row = (2 * (place // columns) + 1) * teacher_rows // (2 * rows)
        column = (2 * (place % columns) + 1) * teacher_columns // (2 * columns)
        matched[token] = teacher.patches[row * teacher_columns + column]
    return matched
