"""A run on images. Beside what every run keeps, its folder holds ``index.json``, the student's images."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from cab.build import distillation_task, student_model, supervised_task, teacher_model
from cab.config import VisionConfig
from cab.data.subset import write_index
from cab.data.vision import load
from cab.distill.task import DistillationTask
from cab.files import save_whole
from cab.recipe import mixing
from cab.report import ACCURACY
from cab.run import Run

STUDENT = "student.safetensors"
TEACHER = "teacher.safetensors"


class VisionRun(Run):
    """A run on images: see :class:`cab.run.Run`."""

    measure = ACCURACY
    config: VisionConfig

    def __init__(self, config: VisionConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self.splits = load(config.data)
        self.classes = len(self.splits.classes)
        self.full, self.train, self.test = self.splits.full, self.splits.train, self.splits.test
        self.mix = mixing(config.data, self.classes)

    def save_data(self) -> None:
        splits = self.splits
        write_index(self.folder / "index.json", splits.names, splits.labels, splits.classes, splits.chosen)

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
        student.load_state_dict(safetensors.torch.load_file(folder / STUDENT))
        return student
