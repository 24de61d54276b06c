"""What a run shows at its end: a table and learning curves, the figures as they came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One line of the table; None where there is no such figure.

    Attributes:
        name: the arm, or "teacher".
        accuracy: on the test split.
        alignment: the alignment loss on the test split.
        seconds: of training.
        images_per_second: of training.
    """

    name: str
    accuracy: float
    alignment: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; '-' where an arm has no such figure."""
    header = ("arm", "accuracy", "alignment loss", "seconds", "images/s")
    lines = [header] + [
        (
            row.name,
            f"{row.accuracy:.1%}",
            _figure(row.alignment, ".4f"),
            _figure(row.seconds, ".1f"),
            _figure(row.images_per_second, ",.0f"),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(metrics: Mapping[str, Sequence[Mapping[str, Any]]], teacher: float | None, title: str, file: Path) -> None:
    """Draw accuracy and training loss over the steps as a PNG.

    Args:
        metrics: the entries of each arm's ``metrics.jsonl``.
        teacher: the teacher's accuracy, drawn as a level; None where there was no teacher.
        title: of the figure.
        file: where the PNG goes.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for name, entries in metrics.items():
        for axes, split, measure, scale in ((accuracy, "test", "accuracy", 100), (loss, "train", "loss", 1)):
            points = [(entry["step"], scale * entry[measure]) for entry in entries if entry["split"] == split]
            axes.plot(*zip(*points, strict=True), label=name)
    if teacher is not None:
        accuracy.axhline(100 * teacher, color="gray", linestyle="--", label="teacher")
    accuracy.set(xlabel="step", ylabel="test accuracy (%)")
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    accuracy.legend()
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)
