"""What a run shows at its end: a table and learning curves, the figures as they came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = (".png", ".pdf", ".svg")  # how the names of those that are drawn may end


class Measure(NamedTuple):
    """By what the students of a run are compared.

    Attributes:
        name: of the measure.
        form: how its figures are written.
        scale: of its axis: figures are drawn times this.
        unit: of its axis.
        samples: what the data consist of.
    """

    name: str
    form: str
    scale: float
    unit: str
    samples: str


ACCURACY = Measure("accuracy", ".1%", 100, " (%)", "images")
PERPLEXITY = Measure("perplexity", ".3f", 1, "", "sequences")


class Row(NamedTuple):
    """One line of the table; None where there is no such figure.

    Attributes:
        name: the arm, or "teacher".
        score: the run's measure, on the test split.
        alignment: the alignment loss on the test split.
        seconds: of training.
        samples_per_second: of training.
        top5: of a classifier, the share of images whose class is among its five best guesses.
    """

    name: str
    score: float
    alignment: float | None = None
    seconds: float | None = None
    samples_per_second: float | None = None
    top5: float | None = None


class Recall(NamedTuple):
    """What models recall from their context.

    Attributes:
        pairs: of key and value in a sequence.
        accuracy: of each model, for each number of pairs, the share of the values that it recalls; None where the
            sequence is longer than the model takes.
    """

    pairs: list[int]
    accuracy: dict[str, list[float | None]]


class Positions(NamedTuple):
    """Perplexity against the position in a sequence.

    Attributes:
        ends: of the ranges of positions, each of which begins where the one before it ends; the first one is the length
            that was learnt.
        perplexity: of each model, for each range; None where the sequence is longer than the model takes.
    """

    ends: list[int]
    perplexity: dict[str, list[float | None]]


def table(measure: Measure, rows: Sequence[Row]) -> str:
    """The rows as aligned text; '-' where an arm has no such figure, and no column for what no arm has."""
    columns = {
        "arm": [row.name for row in rows],
        measure.name: [format(row.score, measure.form) for row in rows],
        "top-5": [_figure(row.top5, ".1%") for row in rows],
        "alignment loss": [_figure(row.alignment, ".4f") for row in rows],
        "seconds": [_figure(row.seconds, ".1f") for row in rows],
        f"{measure.samples}/s": [_figure(row.samples_per_second, ",.0f") for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return _aligned([tuple(shown), *zip(*shown.values(), strict=True)])


def recall_table(recall: Recall) -> str:
    """A line for each model, a column for each number of pairs."""
    accuracy: dict[str, list[float | None]] = {**recall.accuracy, "chance": [1 / pairs for pairs in recall.pairs]}
    rows = [(name, *(_figure(share, ".1%") for share in shares)) for name, shares in accuracy.items()]
    return _aligned([("recall of pairs", *map(str, recall.pairs)), *rows])


def positions_table(positions: Positions) -> str:
    """A line for each model, a column for each range of positions."""
    ranges = [f"{start}-{end}" for start, end in zip([0, *positions.ends], positions.ends, strict=False)]
    rows = [(name, *(_figure(value, ".3f") for value in values)) for name, values in positions.perplexity.items()]
    return _aligned([("perplexity at positions", *ranges), *rows])


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(
    measure: Measure,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    teacher: float | None,
    title: str,
    file: Path,
) -> None:
    """Draw the run's measure and the training loss that the arms share over the steps.

    The whole losses of the arms are different sums: what compares is the KL, and without a teacher the cross-entropy.

    Args:
        measure: of the run.
        metrics: the entries of each arm's ``metrics.jsonl``.
        teacher: the teacher's score, drawn as a level; None where there was no teacher.
        title: of the figure.
        file: where the figure goes, in the form that its name ends in.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    score, loss = figure.subplots(1, 2)
    shared = "kl" if any("kl" in entry for entries in metrics.values() for entry in entries) else "ce"
    for name, entries in metrics.items():
        for axes, split, key, scale in ((score, "test", measure.name, measure.scale), (loss, "train", shared, 1)):
            of_split = [entry for entry in entries if entry["split"] == split and key in entry]
            axes.plot([entry["step"] for entry in of_split], [scale * entry[key] for entry in of_split], label=name)
    if teacher is not None:
        score.axhline(measure.scale * teacher, color="gray", linestyle="--", label="teacher")
    score.set(xlabel="step", ylabel=f"test {measure.name}{measure.unit}")
    loss.set(xlabel="step", ylabel=f"training {shared.upper()}", yscale="log")
    score.legend()
    for axes in (score, loss):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def plot_similarity(similarity: Mapping[str, Sequence[float]], file: Path) -> None:
    """Draw, for each arm, how alike student's and teacher's attention are at each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in similarity.items():
        axes.plot(range(len(values)), values, marker=".", label=name)
    axes.set(xlabel="student layer", ylabel="cosine similarity of the attention maps")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
