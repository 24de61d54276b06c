"""timm's recipe: mixed images and soft labels, which teacher and student see alike."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cab.build import distillation_task, teacher_model
from cab.config import DataConfig
from cab.recipe import mixing
from cab.settings import of_arm, resolve


def batch() -> dict[str, Tensor]:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8) / 4
    return {"images": images.contiguous(), "labels": torch.arange(4)}


def test_nothing_is_mixed_unasked() -> None:
    assert mixing(DataConfig(), 10) is None


def test_smoothing_alone() -> None:
    mixed = mixing(DataConfig(smoothing=0.2), 10)(batch())
    assert torch.equal(mixed["images"], batch()["images"])
    torch.testing.assert_close(mixed["labels"], 0.8 * torch.eye(10)[:4] + 0.02)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_follow_the_images(kind: str) -> None:
    np.random.seed(0)
    mixed = mixing(DataConfig(**{kind: 1.0}), 4)(batch())
    assert not torch.equal(mixed["images"], batch()["images"])
    torch.testing.assert_close(mixed["labels"].sum(-1), torch.ones(4))
    values = mixed["labels"] @ (torch.arange(4.0) / 4)  # each image is one value: its mean is the mean label
    torch.testing.assert_close(mixed["images"].mean(dim=(1, 2, 3)), values)


def test_teacher_and_student_see_the_same_mixed_images() -> None:
    sizes = [
        "student.depth=1",
        "student.embed_dim=16",
        "teacher.depth=1",
        "teacher.embed_dim=16",
        "teacher.num_heads=2",
    ]
    config = of_arm(resolve(settings=[*sizes, "device=cpu"]), "cab")
    task = distillation_task(config, teacher_model(config, 10), 10)
    seen = {}
    task.student.patch_embed.register_forward_pre_hook(lambda module, args: seen.update(student=args[0]))
    task.teacher.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.update(teacher=args[0]))
    np.random.seed(0)
    mixed = mixing(DataConfig(mixup=0.8, smoothing=0.1), 10)(batch())
    outputs = task(**mixed)
    torch.testing.assert_close(
        seen["student"] * task.student_std + task.student_mean, seen["teacher"] * task.teacher.std + task.teacher.mean
    )
    soft = -(mixed["labels"] * outputs["logits"].log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(outputs["ce"], soft)
    outputs["loss"].backward()
