"""From a configuration to models and tasks: the one place where the names and numbers of a run become modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from torch import nn

import cab.students.vim  # noqa: F401  registers the students with timm
from cab.config import TeacherConfig, UserError, VisionConfig, nearest
from cab.distill.task import LossWeights
from cab.distill.vision import VisionTask
from cab.images import input_size
from cab.refusal import refused
from cab.students.student import ImageStudent
from cab.task_options import task_options
from cab.teachers.timm import TimmTeacher

_SHAPE_OF_TEACHER = ("patch_size", "embed_dim", "depth", "num_heads")
_SHAPE_OF_STUDENT = ("patch_size", "embed_dim", "depth", "d_state")


def teacher_model(config: VisionConfig, classes: int, weights: Path | None = None) -> nn.Module:
    """The timm model that teaches.

    Args:
        config: of the run.
        classes: of the data.
        weights: the teacher that the run trained on the spot, where it has; otherwise the configuration decides.

    Raises:
        UserError: no such model, weights that do not fit or cannot be had, or other classes than the data's.
    """
    teacher = config.teacher
    own = weights or (Path(teacher.weights) if teacher.weights else None)
    new_head = own is not None or teacher.steps > 0
    torch.manual_seed(config.seed)
    model = _create(
        teacher.name,
        "teacher.name",
        teacher.image_size or config.data.image_size,
        {name: getattr(teacher, name) for name in _SHAPE_OF_TEACHER},
        pretrained=teacher.pretrained and own is None,
        **({"num_classes": classes} if new_head else {}),
    )
    if own is not None:
        _load(model, own, teacher)
    if model.num_classes != classes:
        raise UserError(
            f"expected a teacher of {classes} classes like the data, got {teacher.name} with {model.num_classes}; "
            "give teacher.weights of your own, or teacher.steps to train a new head on the data first"
        )
    return model


def student_options(config: VisionConfig) -> dict[str, Any]:
    """What timm must be told to make a student of the same shape, beside its name and its classes."""
    student = config.student
    options = {name: getattr(student, name) for name in _SHAPE_OF_STUDENT}
    return {"img_size": config.data.image_size, **{name: value for name, value in options.items() if value is not None}}


def student_model(config: VisionConfig, classes: int) -> ImageStudent:
    """The student with new weights: with one seed the same for every arm, but for A where the arms differ in it."""
    student = config.student
    names = timm.list_models(module="vim")
    if student.name not in names:
        raise UserError(f"expected student.name to be one of {', '.join(names)}, got {student.name!r}")
    torch.manual_seed(config.seed)
    return _create(
        student.name,
        "student.name",
        config.data.image_size,
        {name: getattr(student, name) for name in _SHAPE_OF_STUDENT},
        num_classes=classes,
        drop_path_rate=student.drop_path,
        a_init=student.a_init,
    )


def distillation_task(config: VisionConfig, teacher: nn.Module | None, classes: int) -> VisionTask:
    """Student, teacher and bridges of one arm.

    Args:
        config: of the arm.
        teacher: from :func:`teacher_model`; None where no loss needs one.
        classes: of the data.
    """
    student = student_model(config, classes)
    with refused():
        tapped = TimmTeacher(teacher) if teacher is not None else None
        return VisionTask(student, tapped, **task_options(config, student, tapped))


def supervised_task(model: nn.Module) -> VisionTask:
    """A task that trains or measures a model on the labels alone, on images of the size that it was built for."""
    student, (_, *size) = cast(ImageStudent, model), input_size(model)
    return VisionTask(student, weights=LossWeights(kd=0.0, ce=1.0), student_size=(size[0], size[1]))


def _create(name: str, key: str, image_size: int, shape: dict[str, int | None], **options: Any) -> Any:
    if ":" not in name and not timm.is_model(name):
        raise UserError(
            f"expected {key} to be a model that timm knows, got {name!r}{nearest(name, timm.list_models())}"
        )
    given = {option: value for option, value in shape.items() if value is not None}
    with refused(f"expected {key} to be a model that timm knows"):
        published = timm.get_pretrained_cfg(name)
    if published is None or published.input_size[-1] != image_size:
        options["img_size"] = image_size
        options["pretrained_cfg_overlay"] = {"input_size": (3, image_size, image_size)}
    wanted = "".join(f", {option}={value}" for option, value in given.items())
    with refused(f"expected {key}={name} to take images of {image_size} x {image_size} pixels{wanted}"):
        return timm.create_model(name, **given, **options)


def _load(model: nn.Module, file: Path, teacher: TeacherConfig) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"expected teacher.weights to be a .safetensors file, got {file}")
    if not file.is_file():
        raise UserError(f"expected a file with the teacher's weights, got no file {file}")
    with refused(f"expected the weights of {teacher.name} in {file}"):
        model.load_state_dict(safetensors.torch.load_file(file))
