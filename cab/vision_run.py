"""A run on images. Beside what every run keeps, its folder holds ``index.json``, the student's images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

import cab.processes as processes
from cab.build import distillation_task, student_model, supervised_task, teacher_model
from cab.config import UserError, VisionConfig
from cab.data.subset import read_classes, write_index
from cab.data.vision import load
from cab.distill.similarity import attention_similarity
from cab.distill.task import DistillationTask
from cab.distill.vision import VisionTask
from cab.files import save_whole
from cab.layer_map import layer_map
from cab.recipe import mixing
from cab.refusal import refused
from cab.report import ACCURACY
from cab.run import Run
from cab.students.student import ImageStudent
from cab.teachers.timm import TimmTeacher

INDEX = "index.json"
STUDENT = "student.safetensors"
TEACHER = "teacher.safetensors"


class VisionRun(Run):
    """A run on images: see :class:`cab.run.Run`."""

    measure = ACCURACY
    config: VisionConfig

    def __init__(self, config: VisionConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.splits = load(config.data)
        if config.data.name == "folder" and (folder / INDEX).is_file():
            _check_classes(folder, self.splits.classes, config.data.root)
        self.classes = len(self.splits.classes)
        self.full, self.train, self.test = self.splits.full, self.splits.train, self.splits.test
        self.mix = mixing(config.data, self.classes)
        share = config.optim.batch_size // processes.count()
        if (config.data.mixup or config.data.cutmix) and share % 2:
            raise UserError(
                "expected an even number of images a process in optim.batch_size for data.mixup and data.cutmix, "
                f"got {share}"
            )

    def save_data(self) -> None:
        super().save_data()
        splits = self.splits
        known = splits.names, splits.labels, splits.classes, splits.chosen
        save_whole(self.folder / INDEX, lambda file: write_index(file, *known))

    def files(self) -> tuple[str, Iterable[str]]:
        return self.config.data.root or "", self.splits.files

    def describe(self) -> str:
        splits = self.splits
        return f"student sees {len(splits.chosen)} of {len(splits.names)} training images, tested on {len(splits.test)}"

    def teacher_model(self, trained: bool = False) -> nn.Module:
        return teacher_model(self.config, self.classes, self.folder / TEACHER if trained else None)

    def save_teacher(self, model: nn.Module) -> None:
        save_whole(self.folder / TEACHER, lambda file: safetensors.torch.save_file(model.state_dict(), file))

    def distillation_task(self, arm: VisionConfig, teacher: nn.Module | None) -> DistillationTask:
        return distillation_task(arm, teacher, self.classes)

    def supervised_task(self, model: nn.Module) -> DistillationTask:
        return supervised_task(model)

    def save_student(self, task: DistillationTask, folder: Path) -> None:
        save_whole(folder / STUDENT, lambda file: safetensors.torch.save_file(task.student.state_dict(), file))

    def load_student(self, arm: VisionConfig, folder: Path) -> nn.Module | None:
        if not (folder / STUDENT).is_file():
            return None
        student = student_model(arm, self.classes)
        with refused(f"expected a whole student of the run in {folder / STUDENT}"):
            student.load_state_dict(safetensors.torch.load_file(folder / STUDENT))
        return student

    def attention_similarity(self, images: int) -> dict[str, list[float]]:
        trained = (self.folder / TEACHER).is_file()
        batches = DataLoader(Subset(self.test, range(min(images, len(self.splits.test)))), batch_size=32)
        found = {}
        for name, arm in self.arms.items():
            student = self.load_student(arm, self.folder / name)
            if student is None:
                continue
            teacher = TimmTeacher(self.teacher_model(trained))
            task = VisionTask(cast(ImageStudent, student), teacher, layer_map=self._layer_map(student, teacher)).eval()
            task.to(self.device)
            parts = [
                (len(batch["images"]), attention_similarity(task, batch["images"].to(self.device))) for batch in batches
            ]
            weights = torch.tensor([float(count) for count, _ in parts], device=self.device)
            found[name] = (weights @ torch.stack([part for _, part in parts]) / weights.sum()).tolist()
        if not found:
            raise UserError(f"expected a trained student in {self.folder}, got none")
        return found

    def _layer_map(self, student: nn.Module, teacher: TimmTeacher) -> list[int]:
        return layer_map(self.config.bridge.layer_map, cast(ImageStudent, student).num_layers, teacher.num_layers)


def _check_classes(run: Path, classes: Sequence[str], root: str | None) -> None:
    """Refuse other classes than a run's own, whose students would give them the wrong names."""
    own = read_classes(run / INDEX)
    for place, (expected, got) in enumerate(zip_longest(own, classes)):
        if expected != got:
            raise UserError(
                f"expected the classes of {run} ({_some(own, place)}), got {_some(classes, place)} in {root}"
            )


def _some(classes: Sequence[str], place: int) -> str:
    """How many classes there are, and a few of them, from a place on."""
    start = min(place, len(classes) - 1)
    before, after = ["..."] * (start > 0), ["..."] * (start + 3 < len(classes))
    return f"{len(classes)} classes: {', '.join([*before, *classes[start : start + 3], *after])}"
