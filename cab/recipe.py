"""timm's training recipe where Trainer has none: mixed images, averaged weights, learning rates that fall by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm.data
import timm.optim
import timm.utils
import torch
from timm.data.mixup import mixup_target
from torch import Tensor, nn

import cab.processes as processes
from cab.config import DataConfig
from cab.distill.task import DistillationTask

Batch = dict[str, Tensor]


def mixing(data: DataConfig, classes: int) -> Callable[[Batch], Batch] | None:
    """What turns a training batch into mixed images and soft labels; None where the configuration has neither.

    Teacher and student see the same mixed images, and the KL needs no labels; the cross-entropy takes the soft ones.
    """
    if data.mixup or data.cutmix:
        mixup = timm.data.Mixup(
            mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, label_smoothing=data.smoothing, num_classes=classes
        )

        def mix(batch: Batch) -> Batch:
            images, labels = mixup(batch["images"], batch["labels"])
            return {**batch, "images": images, "labels": labels}

        return mix
    if data.smoothing:
        return lambda batch: {**batch, "labels": mixup_target(batch["labels"], classes, smoothing=data.smoothing)}
    return None


class AveragedWeights:
    """The running average of all that a task trains, by timm's ModelEmaV3; its decay starts low and rises.

    Args:
        task: on its device, sharded or not: its averages are as its parameters.
        decay: the highest.
    """

    def __init__(self, task: DistillationTask, decay: float) -> None:
        self.task = task
        self.ema = timm.utils.ModelEmaV3(self._trained(), decay=decay, use_warmup=True)

    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        self.ema.update(self._trained(), step=step)

    def weights(self) -> dict[str, Tensor]:
        """The averages, whole, for a checkpoint; every process must ask for them."""
        return {
            name: processes.whole(average, processes.own(value)).contiguous()
            for (name, value), average in zip(self.task.named_parameters(), self.ema.module.parameters(), strict=True)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`weights` gave."""
        placed = enumerate(self.task.named_parameters())
        self.ema.module.load_state_dict(
            {str(place): processes.cut(state[name], processes.own(value)) for place, (name, value) in placed}
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The task runs on the averages inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep(self) -> None:
        """Put the averages into the task, at the end of its training."""
        self._swap()

    def _trained(self) -> nn.ParameterList:
        return nn.ParameterList(map(processes.own, self.task.parameters()))

    @torch.no_grad()
    def _swap(self) -> None:
        for own, average in zip(self._trained(), self.ema.module.parameters(), strict=True):
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def layer_decay_groups(
    task: DistillationTask, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """The optimiser's groups: a layer of the student learns ``layer_decay`` times as fast as the one above it.

    The head and the bridges learn at ``lr``. What weight decay would spoil is spared.
    """
    student = task.student
    groups = timm.optim.param_groups_layer_decay(
        student, weight_decay, no_weight_decay_list=student.no_weight_decay(), layer_decay=layer_decay
    )
    found = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": lr * group["lr_scale"]}
        for group in groups
    ]
    if task.bridges is not None:
        spared = task.bridges.no_weight_decay()
        named = list(task.bridges.named_parameters())
        found += [
            {"params": [value for name, value in named if (name in spared) == exempt], "weight_decay": decay, "lr": lr}
            for exempt, decay in ((False, weight_decay), (True, 0.0))
        ]
    return found
