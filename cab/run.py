"""A run: the data, the teacher, each arm in turn, and the folder in which all of it stays.

The folder holds ``config.yaml``, ``index.json`` (the student's images), ``teacher.safetensors`` where the teacher was
trained on the spot, ``results.json``, ``curves.png``, and a folder for each arm: ``metrics.jsonl``, TensorBoard events,
the last checkpoint, and at the end ``student.safetensors``, without the bridges, and ``result.json``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from cab.build import distillation_task, needs_teacher, student_model, supervised_task, teacher_model
from cab.config import Config, UserError
from cab.data.subset import write_index
from cab.data.vision import Splits, load
from cab.report import Row, plot, table
from cab.settings import CONFIG, of_arm, of_run, to_yaml
from cab.trainer import METRICS, TaskTrainer, read_metrics

RESULT = "result.json"
STUDENT = "student.safetensors"
TEACHER = "teacher.safetensors"

Say = Callable[[str], None]


def distill(config: Config, folder: Path, say: Say) -> list[Row]:
    """Train every arm of the run and report; goes on where a run in ``folder`` was interrupted.

    Args:
        config: of the run.
        folder: of the run, made here; a folder that holds files must hold this very run.
        say: takes each line of the report.

    Returns:
        The rows of the table that was reported.

    Raises:
        UserError: something in the configuration or in the data cannot be used.
    """
    splits = load(config.data)
    arms = {name: of_arm(config, name) for name in config.arms}
    _check(config, arms, splits)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(to_yaml(config))
    write_index(folder / "index.json", splits.names, splits.labels, splits.classes, splits.chosen)
    say(f"student sees {len(splits.chosen)} of {len(splits.names)} training images, tested on {len(splits.test)}")
    rows = []
    teacher = None
    if any(map(needs_teacher, arms.values())):
        row, teacher = _teacher(config, splits, folder)
        rows.append(row)
    for name, arm in arms.items():
        rows.append(_arm(name, arm, teacher, splits, folder / name))
    _report(config, rows, folder, say)
    return rows


def evaluate(folder: Path, data: str | None = None) -> list[Row]:
    """Measure the students of a run on the test split, and return a row for each.

    Args:
        folder: of the run.
        data: takes the place of the configuration's ``data.root``.

    Raises:
        UserError: not the folder of a run, or no arm of it has ended.
    """
    config = of_run(folder)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=data))
    splits = load(config.data)
    rows = []
    for name in config.arms:
        file = folder / name / STUDENT
        if file.is_file():
            student = student_model(of_arm(config, name), len(splits.classes))
            student.load_state_dict(safetensors.torch.load_file(file))
            rows.append(Row(name, _accuracy(student, config, splits, folder / name)))
    if not rows:
        raise UserError(f"expected a trained student in {folder}, got none; cab distill --resume {folder} goes on")
    return rows


def _check(config: Config, arms: dict[str, Config], splits: Splits) -> None:
    """Build every arm once and show it an image, so that what does not fit is said before anything is trained."""
    classes = len(splits.classes)
    images = splits.train[0]["images"][None]
    for arm in arms.values():
        teacher = teacher_model(config, classes) if needs_teacher(arm) else None
        with torch.no_grad():
            distillation_task(arm, teacher, classes).eval()(images, torch.tensor([0]))


def _teacher(config: Config, splits: Splits, folder: Path) -> tuple[Row, nn.Module]:
    """The teacher's row and the teacher, trained on the full training split first where the run asks for that."""
    classes = len(splits.classes)
    file, result = folder / TEACHER, folder / "teacher" / RESULT
    if result.is_file():
        return Row(**json.loads(result.read_text())), teacher_model(config, classes, file if file.is_file() else None)
    model = teacher_model(config, classes)
    if config.teacher.steps:
        optim = dataclasses.replace(config.optim, steps=config.teacher.steps, lr=config.teacher.lr)
        plan = dataclasses.replace(config, optim=optim)
        trainer = TaskTrainer(supervised_task(model), plan, folder / "teacher", splits.full, splits.test, "teacher")
        outcome = trainer.run(resume=True)
        safetensors.torch.save_file(model.cpu().state_dict(), file)
        row = Row("teacher", outcome.test["accuracy"], None, outcome.seconds, outcome.images_per_second)
    else:
        row = Row("teacher", _accuracy(model, config, splits, folder / "teacher"))
    result.write_text(json.dumps(row._asdict()) + "\n")
    return row, model


def _arm(name: str, config: Config, teacher: nn.Module | None, splits: Splits, folder: Path) -> Row:
    if (folder / RESULT).is_file():
        return Row(**json.loads((folder / RESULT).read_text()))
    task = distillation_task(config, teacher if needs_teacher(config) else None, len(splits.classes))
    outcome = TaskTrainer(task, config, folder, splits.train, splits.test, name).run(resume=True)
    safetensors.torch.save_file(task.student.cpu().state_dict(), folder / STUDENT)
    row = Row(name, outcome.test["accuracy"], outcome.test.get("align"), outcome.seconds, outcome.images_per_second)
    (folder / RESULT).write_text(json.dumps(row._asdict()) + "\n")
    return row


def _accuracy(model: nn.Module, config: Config, splits: Splits, folder: Path) -> float:
    return TaskTrainer(supervised_task(model), config, folder, splits.train, splits.test).evaluate()["eval_accuracy"]


def _report(config: Config, rows: list[Row], folder: Path, say: Say) -> None:
    accuracy = {row.name: row.accuracy for row in rows}
    results = {"rows": [row._asdict() for row in rows], "environment": _environment()}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    metrics = {name: read_metrics(folder / name / METRICS) for name in config.arms}
    title = f"{config.preset}: {config.student.name} taught by {config.teacher.name}"
    plot(metrics, accuracy.get("teacher"), title, folder / "curves.png")
    say("")
    say(table(rows))
    say("")
    say(f"learning curves: {folder / 'curves.png'}")
    say(f"configuration, metrics, events and weights: {folder}")


def _environment() -> dict[str, str | int]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), **versions, "device": device, "threads": torch.get_num_threads()}
