"""Which teacher layer teaches which student layer."""

from __future__ import annotations

LEARNED = "learned"


def layer_map(text: str, student_layers: int, teacher_layers: int) -> list[int]:
    """The map that a name or a list stands for.

    Args:
        text: "proportional"; "last-K", the same over the teacher's last K layers alone; the teacher layer of each
            student layer, "0,0,1,3", which never goes back; or "learned", of which the bridges hold the weights, and
            whose stand-in, wherever one teacher layer is asked for, is the proportional map.
        student_layers, teacher_layers: their numbers.

    Raises:
        ValueError: the text is none of these, or does not fit the layers.
    """
    if text in ("proportional", LEARNED):
        return proportional(student_layers, teacher_layers)
    prefix, _, count = text.partition("last-")
    if not prefix and count.isdecimal() and 1 <= int(count) <= teacher_layers:
        first = teacher_layers - int(count)
        return [first + layer for layer in proportional(student_layers, int(count))]
    parts = [part.strip() for part in text.split(",")]
    listed = [int(part) for part in parts if part.isdecimal()]
    fits = len(parts) == len(listed) == student_layers and all(layer < teacher_layers for layer in listed)
    if not fits or listed != sorted(listed):
        raise ValueError(
            f"layer_map: expected proportional, learned, last-1 to last-{teacher_layers}, or {student_layers} teacher "
            f"layers from 0 to {teacher_layers - 1} that never go back, got {text!r}"
        )
    return listed


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
