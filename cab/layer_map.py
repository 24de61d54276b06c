"""Which teacher layer teaches which student layer."""

from __future__ import annotations


def proportional(student_layers: int, teacher_layers: int) -> list[int]:
    """The paper's map for any two depths: student layer l learns from teacher layer floor(l * T / L), both from 0.

    Args:
        student_layers: L, at least 1.
        teacher_layers: T, at least 1.

    Returns:
        For each student layer the index of its teacher layer.

    Raises:
        ValueError: a depth below 1.

    Source: arXiv:2510.19266, section 3.2; there l counts from 1, which would point past the last layer.
    """
    if student_layers < 1 or teacher_layers < 1:
        raise ValueError(
            f"proportional: expected at least 1 layer on each side, got {student_layers} student layers "
            f"and {teacher_layers} teacher layers"
        )
    return [layer * teacher_layers // student_layers for layer in range(student_layers)]
